// A shared library with cuSPARSELt's symbols, for the loader: it can be found, has a version and does nothing else.
// FAKE_MINOR: version 0.FAKE_MINOR.3. FAKE_INCOMPLETE: it lacks two functions.
#include "cusparselt/library/api.h"

#define FAKE_EXPORT(name) \
  extern "C" __attribute__((visibility("default"))) int cusparseLt##name() { return 0; }

#ifdef FAKE_INCOMPLETE
FAKE_EXPORT(Init)
FAKE_EXPORT(Destroy)
FAKE_EXPORT(DenseDescriptorInit)
FAKE_EXPORT(StructuredDescriptorInit)
FAKE_EXPORT(MatDescriptorDestroy)
FAKE_EXPORT(MatDescSetAttribute)
FAKE_EXPORT(MatmulDescriptorInit)
FAKE_EXPORT(MatmulDescSetAttribute)
FAKE_EXPORT(MatmulAlgSelectionInit)
FAKE_EXPORT(MatmulAlgSetAttribute)
FAKE_EXPORT(MatmulAlgGetAttribute)
FAKE_EXPORT(MatmulPlanInit)
FAKE_EXPORT(MatmulPlanDestroy)
FAKE_EXPORT(MatmulGetWorkspace)
FAKE_EXPORT(Matmul)
#else
#define cusparseLtGetProperty cusparseLtGetPropertyWithoutArguments
NMS_LT_REQUIRED_FUNCTIONS(FAKE_EXPORT)
#undef cusparseLtGetProperty
NMS_LT_OPTIONAL_FUNCTIONS(FAKE_EXPORT)
#endif

extern "C" __attribute__((visibility("default"))) int cusparseLtGetProperty(int property, int* value) {
  *value = property == 0 ? 0 : property == 1 ? FAKE_MINOR : 3;
  return 0;
}

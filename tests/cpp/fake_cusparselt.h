// cuSPARSELt for tests, without a GPU: an Api whose functions record every call, refuse misuse, fail on demand, and
// really compute, so that operand order, layouts and strides are tested too.
//
// "Device" pointers are host pointers; a "compressed" weight is the dense one, copied. What is misuse: a descriptor
// that was moved or copied, is used before it was made or after it was destroyed, is made twice or destroyed twice; a
// handle used while another device is current; two threads inside the library on one device at once.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "check.h"
#include "cusparselt/library/api.h"

namespace fake {

using namespace nms::lt;

// ---- What is recorded ----

struct Recorder {
  std::mutex mutex;
  std::map<std::string, int> calls;
  std::set<const void*> alive;          // every descriptor and handle that was made and not destroyed
  std::map<std::string, Status> fails;  // call -> what it answers
  std::atomic<int> inside[4] = {};      // threads inside the library, by device
  size_t workspace_bytes = 1000, scratch_bytes = 0;
  int algorithms = 5;
  bool selections_live = true;  // false: a version that has nothing to destroy them with
};

inline Recorder& recorder() {
  static Recorder* instance = new Recorder;
  return *instance;
}

inline thread_local int current_device = 0;

inline void reset() {
  Recorder& r = recorder();
  const std::lock_guard lock(r.mutex);
  CHECK(r.alive.empty());
  r.calls.clear(), r.fails.clear();
  r.workspace_bytes = 1000, r.scratch_bytes = 0;
}

inline int calls(const std::string& name) {
  const std::lock_guard lock(recorder().mutex);
  return recorder().calls[name];
}

inline int all_calls() {
  const std::lock_guard lock(recorder().mutex);
  int total = 0;
  for (const auto& [name, count] : recorder().calls) total += count;
  return total;
}

inline size_t alive() {
  const std::lock_guard lock(recorder().mutex);
  return recorder().alive.size();
}

// One call of the library: counted, alone on its device, and answered by what it was told to answer.
class Call {
 public:
  explicit Call(const char* name) : device_(current_device) {
    CHECK_EQ(recorder().inside[device_].fetch_add(1), 0);
    const std::lock_guard lock(recorder().mutex);
    ++recorder().calls[name];
    const auto told = recorder().fails.find(name);
    status = told == recorder().fails.end() ? kSuccess : told->second;
  }
  ~Call() { recorder().inside[device_].fetch_sub(1); }

  Status status;

 private:
  int device_;
};

// ---- What the opaque memory holds ----

struct Header {
  const void* self;  // where it was made: a copy gives itself away
  int kind;
};
enum Kind { kHandle = 1, kMatrix, kProduct, kSelection, kPlan };

template <class T>
T* make(Opaque* memory, Kind kind, bool counted = true) {
  static_assert(sizeof(T) <= 512);
  CHECK_EQ(reinterpret_cast<uintptr_t>(memory) % 16, 0u);
  T* made = new (memory) T;
  made->header = {memory, kind};
  if (!counted) return made;
  const std::lock_guard lock(recorder().mutex);
  CHECK(recorder().alive.insert(memory).second);
  return made;
}

template <class T>
T* used(const Opaque* memory, Kind kind) {
  T* that = static_cast<T*>(const_cast<Opaque*>(memory));
  CHECK(that->header.self == memory);
  CHECK(that->header.kind == kind);
  return that;
}

inline void destroy(const Opaque* memory) {
  const std::lock_guard lock(recorder().mutex);
  CHECK_EQ(recorder().alive.erase(memory), 1u);
  std::memset(const_cast<Opaque*>(memory), 0xDD, sizeof(Header));
}

struct HandleBody {
  Header header;
  int device;
};
struct Matrix {
  Header header;
  int64_t rows, cols, ld;
  CudaType type;
  Order order;
  bool sparse;
  int batches = 1;
  int64_t stride = 0;

  int64_t at(int64_t r, int64_t c) const { return order == Order::kRow ? r * ld + c : c * ld + r; }
};
struct Product {
  Header header;
  const Matrix *a, *b, *c, *d;
  bool transpose_b;
  int relu = 0, gelu = 0, scales = 0;
  const void* bias = nullptr;
};
struct Selection {
  Header header;
  const Product* product;
  int id = 0, split_k = 1, mode = 0;
};
struct PlanBody {
  Header header;
  const Product* product;
  const Selection* selection;
};

inline void check_handle(const Opaque* handle) { CHECK_EQ(used<HandleBody>(handle, kHandle)->device, current_device); }

inline int bytes_of(CudaType type) {
  return type == CudaType::kR32F || type == CudaType::kR32I     ? 4
         : type == CudaType::kR8I || type == CudaType::kR8FE4M3 ? 1
                                                                : 2;
}

inline double read(const void* data, CudaType type, int64_t i) {
  return type == CudaType::kR32F  ? static_cast<const float*>(data)[i]
         : type == CudaType::kR8I ? static_cast<const int8_t*>(data)[i]
                                  : static_cast<const int32_t*>(data)[i];
}

inline void write(void* data, CudaType type, int64_t i, double value) {
  if (type == CudaType::kR32F)
    static_cast<float*>(data)[i] = static_cast<float>(value);
  else if (type == CudaType::kR32I)
    static_cast<int32_t*>(data)[i] = static_cast<int32_t>(value);
  else
    static_cast<int8_t*>(data)[i] = static_cast<int8_t>(value);
}

// ---- The functions ----

#define FAKE_CALL(name)  \
  const Call call(name); \
  if (call.status != kSuccess) return call.status

inline Status init_handle(Opaque* handle) {
  FAKE_CALL("Init");
  make<HandleBody>(handle, kHandle)->device = current_device;
  return kSuccess;
}

inline Status destroy_handle(const Opaque* handle) {
  const Call call("Destroy");
  destroy(handle);
  return kSuccess;
}

inline Status get_property(int property, int* value) {
  *value = property == 1 ? 8 : 0;
  return kSuccess;
}

inline void fill(Opaque* mat, int64_t rows, int64_t cols, int64_t ld, CudaType type, Order order, bool sparse) {
  Matrix* m = make<Matrix>(mat, kMatrix);
  m->rows = rows, m->cols = cols, m->ld = ld, m->type = type, m->order = order, m->sparse = sparse;
}

inline Status dense_init(const Opaque* handle, Opaque* mat, int64_t rows, int64_t cols, int64_t ld, uint32_t alignment,
                         CudaType type, Order order) {
  FAKE_CALL("DenseDescriptorInit");
  check_handle(handle);
  if (alignment % 16 != 0) return kInvalidValue;
  fill(mat, rows, cols, ld, type, order, false);
  return kSuccess;
}

inline Status structured_init(const Opaque* handle, Opaque* mat, int64_t rows, int64_t cols, int64_t ld,
                              uint32_t alignment, CudaType type, Order order, Sparsity) {
  FAKE_CALL("StructuredDescriptorInit");
  check_handle(handle);
  if (alignment % 16 != 0) return kInvalidValue;
  fill(mat, rows, cols, ld, type, order, true);
  return kSuccess;
}

inline Status destroy_matrix(const Opaque* mat) {
  const Call call("MatDescriptorDestroy");
  destroy(mat);
  return kSuccess;
}

inline Status set_matrix(const Opaque* handle, Opaque* mat, MatAttribute attribute, const void* data, size_t bytes) {
  FAKE_CALL("MatDescSetAttribute");
  check_handle(handle);
  Matrix* m = used<Matrix>(mat, kMatrix);
  if (attribute == MatAttribute::kNumBatches) {
    CHECK_EQ(bytes, sizeof(int));
    std::memcpy(&m->batches, data, bytes);
  } else {
    CHECK_EQ(bytes, sizeof(int64_t));
    std::memcpy(&m->stride, data, bytes);
  }
  return kSuccess;
}

inline Status product_init(const Opaque* handle, Opaque* matmul, Operation a_op, Operation b_op, const Opaque* a,
                           const Opaque* b, const Opaque* c, const Opaque* d, Compute) {
  FAKE_CALL("MatmulDescriptorInit");
  check_handle(handle);
  CHECK(a_op == Operation::kNone);
  Product* p = make<Product>(matmul, kProduct, /*counted=*/false);  // nothing destroys one
  p->a = used<Matrix>(a, kMatrix), p->b = used<Matrix>(b, kMatrix);
  p->c = used<Matrix>(c, kMatrix), p->d = used<Matrix>(d, kMatrix);
  p->transpose_b = b_op == Operation::kTranspose;
  const int64_t k = p->transpose_b ? p->b->cols : p->b->rows, n = p->transpose_b ? p->b->rows : p->b->cols;
  const bool fits = p->a->sparse && !p->b->sparse && p->a->cols == k && p->d->rows == p->a->rows && p->d->cols == n &&
                    p->a->type == p->b->type && p->c->order == p->d->order && p->c->ld == p->d->ld &&
                    p->a->batches == p->b->batches && p->a->batches == p->d->batches;
  return fits ? kSuccess : kNotSupported;
}

inline Status set_product(const Opaque* handle, Opaque* matmul, MatmulAttribute attribute, const void* data,
                          size_t bytes) {
  FAKE_CALL("MatmulDescSetAttribute");
  check_handle(handle);
  Product* p = used<Product>(matmul, kProduct);
  if (attribute == MatmulAttribute::kBiasPointer) {
    CHECK_EQ(bytes, sizeof(void*));
    std::memcpy(&p->bias, data, bytes);
    return kSuccess;
  }
  CHECK_EQ(bytes, sizeof(int));
  int* field = attribute == MatmulAttribute::kRelu   ? &p->relu
               : attribute == MatmulAttribute::kGelu ? &p->gelu
                                                     : &p->scales;
  std::memcpy(field, data, bytes);
  return kSuccess;
}

inline Status selection_init(const Opaque* handle, Opaque* selection, const Opaque* matmul, Algorithm) {
  FAKE_CALL("MatmulAlgSelectionInit");
  check_handle(handle);
  make<Selection>(selection, kSelection, recorder().selections_live)->product = used<Product>(matmul, kProduct);
  return kSuccess;
}

inline Status selection_set(const Opaque* handle, Opaque* selection, AlgorithmAttribute attribute, const void* data,
                            size_t bytes) {
  FAKE_CALL("MatmulAlgSetAttribute");
  check_handle(handle);
  Selection* s = used<Selection>(selection, kSelection);
  CHECK_EQ(bytes, sizeof(int));
  int value;
  std::memcpy(&value, data, bytes);
  if (attribute == AlgorithmAttribute::kConfigId) {
    if (value < 0 || value >= recorder().algorithms) return kInvalidValue;
    s->id = value;
  } else {
    (attribute == AlgorithmAttribute::kSplitK ? s->split_k : s->mode) = value;
  }
  return kSuccess;
}

inline Status selection_get(const Opaque* handle, const Opaque* selection, AlgorithmAttribute attribute, void* data,
                            size_t bytes) {
  FAKE_CALL("MatmulAlgGetAttribute");
  check_handle(handle);
  used<Selection>(selection, kSelection);
  CHECK(attribute == AlgorithmAttribute::kConfigMaxId);
  std::memcpy(data, &recorder().algorithms, bytes);
  return kSuccess;
}

inline Status destroy_selection(const Opaque* selection) {
  const Call call("MatmulAlgSelectionDestroy");
  destroy(selection);
  return kSuccess;
}

inline Status plan_init(const Opaque* handle, Opaque* plan, const Opaque* matmul, const Opaque* selection) {
  FAKE_CALL("MatmulPlanInit");
  check_handle(handle);
  PlanBody* p = make<PlanBody>(plan, kPlan);
  p->product = used<Product>(matmul, kProduct);
  p->selection = used<Selection>(selection, kSelection);
  return kSuccess;
}

inline Status destroy_plan(const Opaque* plan) {
  const Call call("MatmulPlanDestroy");
  const PlanBody* p = used<PlanBody>(plan, kPlan);
  used<Selection>(p->selection, kSelection);  // the plan goes first
  destroy(plan);
  return kSuccess;
}

inline Status workspace(const Opaque* handle, const Opaque* plan, size_t* bytes) {
  FAKE_CALL("MatmulGetWorkspace");
  check_handle(handle);
  used<PlanBody>(plan, kPlan);
  *bytes = recorder().workspace_bytes;
  return kSuccess;
}

inline Status matmul(const Opaque* handle, const Opaque* plan, const void* alpha, const void* a, const void* b,
                     const void* beta, const void*, void* d, void* workspace, void**, int32_t streams) {
  FAKE_CALL("Matmul");
  check_handle(handle);
  const Product& p = *used<Product>(used<PlanBody>(plan, kPlan)->product, kProduct);
  CHECK_EQ(streams, 1);
  CHECK_EQ(*static_cast<const float*>(beta), 0.0f);
  CHECK_EQ(workspace != nullptr, recorder().workspace_bytes != 0);
  if (workspace)
    std::memset(workspace, 0x5A, recorder().workspace_bytes);  // the sanitizer sees that all of it is there
  const Matrix &ma = *p.a, &mb = *p.b, &md = *p.d;
  for (int batch = 0; batch < ma.batches; ++batch)
    for (int64_t r = 0; r < md.rows; ++r)
      for (int64_t c = 0; c < md.cols; ++c) {
        double sum = 0;
        for (int64_t i = 0; i < ma.cols; ++i)
          sum += read(a, ma.type, batch * ma.stride + ma.at(r, i)) *
                 read(b, mb.type, batch * mb.stride + (p.transpose_b ? mb.at(c, i) : mb.at(i, c)));
        sum *= static_cast<const float*>(alpha)[p.scales ? r : 0];
        if (p.bias) sum += read(p.bias, CudaType::kR32F, r);
        if (p.relu && sum < 0) sum = 0;
        write(d, md.type, batch * md.stride + md.at(r, c), sum);
      }
  return kSuccess;
}

inline size_t weight_bytes(const Matrix& w) {
  return static_cast<size_t>(w.rows * w.cols * w.batches * bytes_of(w.type));
}

inline Status compressed_size(const Opaque* handle, const Opaque* mat, size_t* compressed, size_t* scratch) {
  FAKE_CALL("SpMMACompressedSize2");
  check_handle(handle);
  *compressed = weight_bytes(*used<Matrix>(mat, kMatrix));
  *scratch = recorder().scratch_bytes;
  return kSuccess;
}

inline Status compress(const Opaque* handle, const Opaque* mat, int sparse_is_a, Operation op, const void* dense,
                       void* compressed, void* scratch, void*) {
  FAKE_CALL("SpMMACompress2");
  check_handle(handle);
  CHECK_EQ(sparse_is_a, 1);
  CHECK(op == Operation::kNone);
  CHECK_EQ(scratch != nullptr, recorder().scratch_bytes != 0);
  std::memcpy(compressed, dense, weight_bytes(*used<Matrix>(mat, kMatrix)));
  return kSuccess;
}

// minor < 8: a version without MatmulAlgSelectionDestroy.
inline Api api(int minor = 8) {
  recorder().selections_live = minor >= 8;
  Api table;
  table.version = {0, minor, 0};
  table.path = "fake";
  table.Init = init_handle, table.Destroy = destroy_handle, table.GetProperty = get_property;
  table.DenseDescriptorInit = dense_init, table.StructuredDescriptorInit = structured_init;
  table.MatDescriptorDestroy = destroy_matrix, table.MatDescSetAttribute = set_matrix;
  table.MatmulDescriptorInit = product_init, table.MatmulDescSetAttribute = set_product;
  table.MatmulAlgSelectionInit = selection_init, table.MatmulAlgSetAttribute = selection_set;
  table.MatmulAlgGetAttribute = selection_get;
  table.MatmulPlanInit = plan_init, table.MatmulPlanDestroy = destroy_plan, table.MatmulGetWorkspace = workspace;
  table.Matmul = matmul;
  table.SpMMACompressedSize2 = compressed_size, table.SpMMACompress2 = compress;
  table.MatmulAlgSelectionDestroy = minor >= 8 ? destroy_selection : nullptr;
  return table;
}

}  // namespace fake

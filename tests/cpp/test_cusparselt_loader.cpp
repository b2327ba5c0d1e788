// How cuSPARSELt is found: the first library that will do wins, and each that will not says why. FAKE_CUSPARSELT_DIR
// holds what fake_cusparselt/library.cpp was built into.
#include <string>

#include "check.h"
#include "cusparselt/library/loader.h"

namespace {

using nms::lt::load;
using nms::lt::Loaded;

std::string fake(const std::string& name) { return FAKE_CUSPARSELT_DIR "/libfake_cusparselt_" + name + ".so"; }

bool has(const Loaded& loaded, const std::string& part) {
  if (loaded.reason.find(part) != std::string::npos) return true;
  std::fprintf(stderr, "\"%s\" lacks \"%s\"\n", loaded.reason.c_str(), part.c_str());
  return false;
}

void test_a_library_that_will_do() {
  const Loaded loaded = load({fake("8")});
  CHECK(loaded.api != nullptr);
  CHECK(loaded.reason == "");
  CHECK(loaded.api->version.text() == "0.8.3");
  CHECK(loaded.api->path == fake("8"));
  CHECK_EQ(loaded.api->Init(nullptr), 0);
  CHECK_EQ(
      loaded.api->Matmul(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, 0),
      0);
  CHECK(loaded.api->MatmulAlgSelectionDestroy != nullptr);
}

void test_what_will_not_do_says_why() {
  Loaded none = load({});
  CHECK(none.api == nullptr);
  CHECK(has(none, "nowhere to look"));

  none = load({"/nonexistent/libcusparseLt.so.0"});
  CHECK(none.api == nullptr);
  CHECK(has(none, "/nonexistent/libcusparseLt.so.0: "));
  CHECK(has(none, "cannot open shared object file"));

  none = load({fake("5"), fake("11"), fake("incomplete")});
  CHECK(none.api == nullptr);
  CHECK(has(none, fake("5") + ": version 0.5.3 is not one of 0.6 to 0.10"));
  CHECK(has(none, fake("11") + ": version 0.11.3 is not one of 0.6 to 0.10"));
  CHECK(has(none, fake("incomplete") + ": it lacks cusparseLtSpMMACompressedSize2, cusparseLtSpMMACompress2"));
}

void test_the_first_that_will_do_wins() {
  const Loaded loaded = load({"/nonexistent/a.so", fake("5"), fake("10"), fake("8")});
  CHECK(loaded.api != nullptr);
  CHECK(loaded.api->version.text() == "0.10.3");
}

}  // namespace

int main() {
  test_a_library_that_will_do();
  test_what_will_not_do_says_why();
  test_the_first_that_will_do_wins();
}

// cuSPARSELt's host side against a fake of the library that records every call: results, plan cache, handles,
// workspaces, leaks, errors, threads.
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "cusparselt/library/engine.h"
#include "cusparselt/library/error.h"
#include "fake_cusparselt.h"

namespace {

using namespace nms;
using namespace nms::lt;

// Device memory on the host; counts what is out.
class HostMemory : public Memory {
 public:
  void* allocate(int, void*, size_t bytes) override {
    if (refuse) throw std::runtime_error("out of memory");
    const std::lock_guard lock(mutex_);
    ++allocations;
    ++out;
    return ::operator new(bytes, std::align_val_t(256));
  }
  void release(void* block) noexcept override {
    const std::lock_guard lock(mutex_);
    --out;
    ::operator delete(block, std::align_val_t(256));
  }
  void copy(void*, void* to, const void* from, size_t bytes) override { std::memcpy(to, from, bytes); }
  bool is_capturing(void*) override { return capturing; }

  int allocations = 0, out = 0;
  bool refuse = false, capturing = false;

 private:
  std::mutex mutex_;
};

void* stream(int number) { return reinterpret_cast<void*>(static_cast<uintptr_t>(number)); }

template <class T>
struct Aligned {
  explicit Aligned(size_t n) : data(static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(16)))), size(n) {}
  ~Aligned() { ::operator delete(data, std::align_val_t(16)); }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;

  T* data;
  size_t size;
};

Problem float_problem(int64_t rows, int64_t k, int64_t tokens) {
  Problem p;
  p.rows = rows, p.k = k, p.tokens = tokens, p.x_ld = k;
  p.type = DType::kFloat32, p.out = OutType::kFloat32;
  return p;
}

Problem weight_of(Problem p) {
  p.tokens = 0;
  return p;
}

// Compresses and multiplies through the engine; compares with loops that spell out y = alpha x W^T + bias.
void check_product(Engine& engine, Problem p, unsigned seed) {
  std::mt19937 random(seed);
  const auto fill = [&](Aligned<float>& a) {
    for (size_t i = 0; i < a.size; ++i) a.data[i] = static_cast<float>(static_cast<int>(random() % 9) - 4);
  };
  const bool by_rows = p.x_layout == XLayout::kTokenRows;
  const int64_t x_one = p.x_ld * (by_rows ? p.tokens : p.k);
  Aligned<float> w(p.batches * p.rows * p.k), x(x_one + p.x_batch_stride * (p.batches - 1)), bias(p.rows);
  Aligned<float> y(p.batches * p.tokens * p.rows);
  fill(w), fill(x), fill(bias);
  if (p.bias) p.bias = bias.data;
  Aligned<std::byte> blob(engine.compressed_bytes(0, weight_of(p)));
  engine.compress(0, stream(1), weight_of(p), w.data, blob.data);
  const float alpha = 0.5f;
  engine.matmul(0, stream(1), p, &alpha, blob.data, x.data, y.data);
  for (int64_t b = 0; b < p.batches; ++b)
    for (int64_t t = 0; t < p.tokens; ++t)
      for (int64_t r = 0; r < p.rows; ++r) {
        float sum = 0;
        for (int64_t i = 0; i < p.k; ++i)
          sum += w.data[(b * p.rows + r) * p.k + i] *
                 x.data[b * p.x_batch_stride + (by_rows ? t * p.x_ld + i : i * p.x_ld + t)];
        sum = alpha * sum + (p.bias ? bias.data[r] : 0);
        if (p.activation == Activation::kRelu && sum < 0) sum = 0;
        CHECK_EQ(y.data[(b * p.tokens + t) * p.rows + r], sum);
      }
}

void test_results() {
  fake::reset();
  for (const int minor : {6, 7, 8, 10}) {
    const Api api = fake::api(minor);
    HostMemory memory;
    {
      Engine engine(api, memory);
      check_product(engine, float_problem(16, 24, 8), 1);
      Problem p = float_problem(24, 16, 12);
      p.x_ld = 20, p.activation = Activation::kRelu, p.bias = &p;
      check_product(engine, p, 2);
      p.x_layout = XLayout::kTokenColumns, p.x_ld = 16;
      check_product(engine, p, 3);
      p = float_problem(8, 16, 4);
      p.batches = 3, p.x_batch_stride = 4 * 16;
      check_product(engine, p, 4);
      p.x_batch_stride = 0;
      check_product(engine, p, 5);
    }
    CHECK_EQ(fake::alive(), 0u);
    CHECK_EQ(memory.out, 0);
  }
  fake::api();
}

void test_int8_scales_rows_by_a_vector() {
  fake::reset();
  const Api api = fake::api();
  HostMemory memory;
  Engine engine(api, memory);
  Problem p;
  p.rows = 32, p.k = 32, p.tokens = 16, p.x_ld = 32;
  p.type = DType::kInt8, p.out = OutType::kInt32, p.scales = true;
  Aligned<int8_t> w(32 * 32), x(16 * 32);
  Aligned<int32_t> y(16 * 32);
  Aligned<float> scales(32);
  for (int i = 0; i < 32 * 32; ++i) w.data[i] = static_cast<int8_t>(i % 7 - 3);
  for (int i = 0; i < 16 * 32; ++i) x.data[i] = static_cast<int8_t>(i % 5 - 2);
  for (int i = 0; i < 32; ++i) scales.data[i] = static_cast<float>(i);
  engine.matmul(0, nullptr, p, scales.data, w.data, x.data, y.data);
  for (int t = 0; t < 16; ++t)
    for (int r = 0; r < 32; ++r) {
      int sum = 0;
      for (int i = 0; i < 32; ++i) sum += w.data[r * 32 + i] * x.data[t * 32 + i];
      CHECK_EQ(y.data[t * 32 + r], sum * r);
    }
}

// One weight and one x, for tests that count calls rather than look at results.
struct Fixture {
  Fixture() : w(16 * 16), x(64 * 16), y(64 * 16) {
    fake::reset();
    for (Aligned<float>* a : {&w, &x}) std::fill_n(a->data, a->size, 1.0f);
  }

  void run(Engine& engine, int64_t tokens, int device = 0, void* on = nullptr, const void* bias = nullptr,
           Choice choice = {}) {
    Problem p = float_problem(16, 16, tokens);
    p.bias = bias, p.choice = choice;
    const float alpha = 1;
    engine.matmul(device, on, p, &alpha, w.data, x.data, y.data);
  }

  Aligned<float> w, x, y;
  HostMemory memory;
  Api api = fake::api();
};

void test_a_hit_is_one_call_of_the_library() {
  Fixture f;
  Engine engine(f.api, f.memory);
  f.run(engine, 8);
  const int before = fake::all_calls(), allocations = f.memory.allocations;
  for (int i = 0; i < 100; ++i) f.run(engine, 8);
  CHECK_EQ(fake::all_calls() - before, 100);
  CHECK_EQ(fake::calls("Matmul"), 101);
  CHECK_EQ(fake::calls("MatmulPlanInit"), 1);
  CHECK_EQ(f.memory.allocations, allocations);
  const DeviceStatistics s = engine.statistics().at(0);
  CHECK_EQ(s.hits, 100);
  CHECK_EQ(s.misses, 1);
  CHECK_EQ(s.plans, 1);
}

void test_whatever_matters_is_in_the_key() {
  Problem base = float_problem(16, 16, 8);
  base.batches = 2;
  int other = 0;
  const std::vector<std::function<void(Problem&)>> changes = {
      [](Problem& p) { p.rows = 32; },
      [](Problem& p) { p.k = 32; },
      [](Problem& p) { p.tokens = 16; },
      [](Problem& p) { p.x_ld = 20; },
      [](Problem& p) { p.batches = 3; },
      [](Problem& p) { p.x_batch_stride = 128; },
      [](Problem& p) { p.type = DType::kBFloat16; },
      [](Problem& p) { p.out = OutType::kInt32; },
      [](Problem& p) { p.x_layout = XLayout::kTokenColumns; },
      [](Problem& p) { p.activation = Activation::kRelu; },
      [](Problem& p) { p.scales = true; },
      [&](Problem& p) { p.bias = &other; },
      [](Problem& p) { p.choice.id = 0; },
      [](Problem& p) { p.choice.split_k = 2; },
      [](Problem& p) { p.choice.split_k_mode = 1; },
  };
  CHECK(base == Problem(base));
  CHECK_EQ(ProblemHash{}(base), ProblemHash{}(Problem(base)));
  for (const auto& change : changes) {
    Problem p = base;
    change(p);
    CHECK(!(p == base));
    CHECK(ProblemHash{}(p) != ProblemHash{}(base));
  }
}

void test_eviction_destroys_the_least_recently_used() {
  Fixture f;
  Engine engine(f.api, f.memory);
  engine.set_plan_limit(3);
  for (const int64_t tokens : {8, 16, 24}) f.run(engine, tokens);
  const size_t full = fake::alive();
  f.run(engine, 8);   // 16 is the oldest now
  f.run(engine, 32);  // and goes
  CHECK_EQ(fake::alive(), full);
  CHECK_EQ(fake::calls("MatmulPlanDestroy"), 1);
  CHECK_EQ(fake::calls("MatmulAlgSelectionDestroy"), 1);
  CHECK_EQ(fake::calls("MatDescriptorDestroy"), 4);
  CHECK_EQ(engine.statistics().at(0).evictions, 1);
  f.run(engine, 8);
  CHECK_EQ(engine.statistics().at(0).misses, 4);
  f.run(engine, 16);
  CHECK_EQ(engine.statistics().at(0).misses, 5);
  engine.set_plan_limit(1);
  f.run(engine, 48);
  CHECK_EQ(engine.statistics().at(0).plans, 1);
  CHECK_EQ(engine.plan_limit(), 1u);
}

void test_an_algorithm_has_a_plan_of_its_own() {
  Fixture f;
  Engine engine(f.api, f.memory);
  f.run(engine, 8);
  f.run(engine, 8, 0, nullptr, nullptr, {3, 2, 1});
  CHECK_EQ(engine.statistics().at(0).misses, 2);
  CHECK_EQ(engine.algorithms(0, float_problem(16, 16, 8)), 5);
}

// Parameters: every call finds them where they were.
void test_a_bias_that_stays_gets_a_plan_of_its_own() {
  Fixture f;
  Engine engine(f.api, f.memory);
  Aligned<float> a(16), b(16);
  std::fill_n(a.data, 16, 1.0f), std::fill_n(b.data, 16, 2.0f);
  for (int i = 0; i < 10; ++i) {
    f.run(engine, 8, 0, nullptr, a.data);
    CHECK_EQ(f.y.data[0], 17.0f);
    f.run(engine, 8, 0, nullptr, b.data);
    CHECK_EQ(f.y.data[0], 18.0f);
  }
  const DeviceStatistics s = engine.statistics().at(0);
  CHECK_EQ(s.plans, 3);  // theirs, and the one that both shared before
  CHECK_EQ(s.misses, 3);
  CHECK_EQ(s.hits, 17);
  CHECK_EQ(s.bias_copies, 2);
  a.data[0] = 5;  // what is there counts, not what was there
  f.run(engine, 8, 0, nullptr, a.data);
  CHECK_EQ(f.y.data[0], 21.0f);
  const int before = fake::all_calls();
  f.run(engine, 8, 0, nullptr, a.data);
  CHECK_EQ(fake::all_calls() - before, 1);
}

// Autocast: a cast bias is somewhere else in every call.
void test_a_hundred_addresses_of_a_bias_make_one_plan() {
  Fixture f;
  {
    Engine engine(f.api, f.memory);
    Aligned<float> cast(100 * 16);
    for (int i = 0; i < 100 * 16; ++i) cast.data[i] = static_cast<float>(i / 16);
    for (int i = 0; i < 100; ++i) {
      f.run(engine, 8, 0, nullptr, cast.data + 16 * i);
      CHECK_EQ(f.y.data[0], 16.0f + i);
      CHECK_EQ(f.y.data[16 * 8 - 1], 16.0f + i);
    }
    CHECK_EQ(fake::calls("MatmulPlanInit"), 1);
    CHECK_EQ(fake::calls("Matmul"), 100);
    const DeviceStatistics s = engine.statistics().at(0);
    CHECK_EQ(s.plans, 1);
    CHECK_EQ(s.bias_copies, 100);
    CHECK_EQ(f.memory.allocations, 2);  // the workspace, and where biases are copied to
    CHECK_EQ(s.workspace_bytes, 2 * 65536);

    // One that begins at no multiple of 16 bytes is copied in every call.
    for (int i = 0; i < 3; ++i) f.run(engine, 8, 0, nullptr, cast.data + 17);
    CHECK_EQ(f.y.data[0], 17.0f);
    CHECK_EQ(f.y.data[15], 18.0f);
    CHECK_EQ(fake::calls("MatmulPlanInit"), 1);

    // Other products on the stream share the place, but no plan; other streams have a place of their own.
    f.run(engine, 16, 0, nullptr, cast.data + 32);
    CHECK_EQ(f.y.data[0], 18.0f);
    CHECK_EQ(f.memory.allocations, 2);
    f.run(engine, 8, 0, stream(1), cast.data + 49);
    CHECK_EQ(f.y.data[0], 19.0f);
    CHECK_EQ(f.memory.allocations, 4);
    CHECK_EQ(fake::calls("MatmulPlanInit"), 3);
    engine.clear(0);
    CHECK_EQ(f.memory.out, 0);
    f.run(engine, 8, 0, nullptr, cast.data + 64);
    CHECK_EQ(f.y.data[0], 20.0f);
  }
  CHECK_EQ(fake::alive(), 0u);
  CHECK_EQ(f.memory.out, 0);
}

// No plan goes for an address that may never come back, and none is made for one while a graph is captured.
void test_when_no_bias_gets_a_plan_of_its_own() {
  Fixture f;
  Engine engine(f.api, f.memory);
  engine.set_plan_limit(2);
  Aligned<float> bias(16);
  std::fill_n(bias.data, 16, 1.0f);
  for (const int64_t tokens : {8, 16}) f.run(engine, tokens, 0, nullptr, bias.data);
  for (int i = 0; i < 5; ++i) f.run(engine, 8, 0, nullptr, bias.data);
  CHECK_EQ(engine.statistics().at(0).misses, 2);
  CHECK_EQ(engine.statistics().at(0).evictions, 0);
  engine.set_plan_limit(9);
  f.memory.capturing = true;
  f.run(engine, 8, 0, nullptr, bias.data);
  CHECK_EQ(engine.statistics().at(0).misses, 2);
  f.memory.capturing = false;
  f.run(engine, 8, 0, nullptr, bias.data);
  CHECK_EQ(engine.statistics().at(0).misses, 3);
  CHECK_EQ(f.y.data[0], 17.0f);
}

void test_wide_biases_of_other_types() {
  Problem p;
  p.type = DType::kInt8, p.out = OutType::kInt8;
  CHECK_EQ(element_bytes(bias_type(p)), 4);
  p.type = DType::kFloat8E4M3, p.out = OutType::kFloat8E4M3;
  CHECK_EQ(element_bytes(bias_type(p)), 2);
  CHECK_EQ(element_bytes(CudaType::kR8I) + element_bytes(CudaType::kR8FE4M3) + element_bytes(CudaType::kR32I), 6);
}

void test_a_device_has_one_handle() {
  Fixture f;
  {
    Engine engine(f.api, f.memory);
    for (int round = 0; round < 3; ++round)
      for (int device = 0; device < 2; ++device) {
        fake::current_device = device;
        f.run(engine, 8, device);
        engine.compressed_bytes(device, weight_of(float_problem(16, 16, 8)));
      }
    CHECK_EQ(fake::calls("Init"), 2);
    CHECK_EQ(engine.statistics().size(), 2u);
    CHECK_EQ(engine.statistics().at(1).device, 1);
    CHECK_EQ(engine.statistics().at(1).misses, 1);

    fake::current_device = 0;
    engine.clear(0);
    CHECK_EQ(fake::calls("Destroy"), 1);
    CHECK_EQ(engine.statistics().at(0).plans, 0);
    CHECK_EQ(engine.statistics().at(0).workspace_bytes, 0);
    f.run(engine, 8);  // and it all begins anew
    CHECK_EQ(fake::calls("Init"), 3);
  }
  CHECK_EQ(fake::alive(), 0u);
  CHECK_EQ(f.memory.out, 0);
}

void test_a_stream_has_one_workspace() {
  Fixture f;
  Engine engine(f.api, f.memory);
  f.run(engine, 8, 0, stream(1)), f.run(engine, 8, 0, stream(2)), f.run(engine, 8, 0, stream(1));
  CHECK_EQ(f.memory.allocations, 2);
  CHECK_EQ(engine.statistics().at(0).streams, 2);

  fake::recorder().workspace_bytes = 100000;  // outgrown: a graph may still use the old block, so it stays
  f.run(engine, 16, 0, stream(1));
  CHECK_EQ(f.memory.allocations, 3);
  CHECK_EQ(f.memory.out, 3);
  CHECK_EQ(engine.statistics().at(0).workspace_bytes, 2 * 65536 + 131072);
  fake::recorder().workspace_bytes = 0;
  f.run(engine, 24, 0, stream(3));
  CHECK_EQ(f.memory.allocations, 3);

  fake::recorder().scratch_bytes = 5000;
  Aligned<std::byte> blob(16 * 16 * 4);
  engine.compress(0, stream(1), weight_of(float_problem(16, 16, 8)), f.w.data, blob.data);
  CHECK_EQ(f.memory.allocations, 3);
}

std::string error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

bool has(const std::string& text, const std::string& part) {
  if (text.find(part) != std::string::npos) return true;
  std::fprintf(stderr, "\"%s\" lacks \"%s\"\n", text.c_str(), part.c_str());
  return false;
}

void test_every_call_that_fails_says_so_and_leaks_nothing() {
  const std::vector<std::string> steps = {"Init",
                                          "StructuredDescriptorInit",
                                          "DenseDescriptorInit",
                                          "MatDescSetAttribute",
                                          "MatmulDescriptorInit",
                                          "MatmulDescSetAttribute",
                                          "MatmulAlgSelectionInit",
                                          "MatmulAlgGetAttribute",
                                          "MatmulAlgSetAttribute",
                                          "MatmulPlanInit",
                                          "MatmulGetWorkspace",
                                          "Matmul"};
  const std::vector<std::pair<Status, std::string>> statuses = {{kNotInitialized, "NOT_INITIALIZED (1) for"},
                                                                {kAllocFailed, "out of memory"},
                                                                {kInvalidValue, "INVALID_VALUE (3)"},
                                                                {kArchMismatch, "compute capability 8.0"},
                                                                {kExecutionFailed, "EXECUTION_FAILED (6)"},
                                                                {kInternalError, "CUDA_LAUNCH_BLOCKING"},
                                                                {kNotSupported, "no kernel for this combination"},
                                                                {99, "cusparseStatus_t (99)"}};
  for (const std::string& step : steps)
    for (const auto& [status, words] : statuses) {
      Fixture f;
      {
        Engine engine(f.api, f.memory);
        Problem p = float_problem(8, 16, 4);
        p.batches = 2, p.x_batch_stride = 64, p.activation = Activation::kRelu, p.choice = {1, 1, 0};
        const float alpha = 1;
        const auto run = [&] { engine.matmul(0, nullptr, p, &alpha, f.w.data, f.x.data, f.y.data); };
        fake::recorder().fails = {{step, status}};
        const std::string said = error_of(run);
        CHECK(has(said, words));
        CHECK(has(said, "cusparseLt" + step + " answered"));
        CHECK(has(said, "cuSPARSELt 0.8.0"));
        if (step != "Init" && step != "MatDescSetAttribute")
          CHECK(has(said, "W [2, 8, 16] float32 times x [2, 4, 16], y float32, relu, algorithm 1"));
        fake::recorder().fails.clear();  // what failed once may succeed later
        CHECK(error_of(run) == "");
      }
      CHECK_EQ(fake::alive(), 0u);
      CHECK_EQ(f.memory.out, 0);
    }
}

void test_compression_that_fails_says_so() {
  for (const std::string step : {"SpMMACompressedSize2", "SpMMACompress2", "StructuredDescriptorInit"}) {
    Fixture f;
    Engine engine(f.api, f.memory);
    fake::recorder().fails = {{step, kInternalError}};
    const Problem weight = weight_of(float_problem(16, 16, 8));
    Aligned<std::byte> blob(16 * 16 * 4);
    const std::string said = error_of([&] { engine.compress(0, nullptr, weight, f.w.data, blob.data); });
    CHECK(has(said, "cusparseLt" + step + " answered CUSPARSE_STATUS_INTERNAL_ERROR (7) for W [16, 16] float32"));
    if (step != "SpMMACompress2") CHECK(has(error_of([&] { engine.compressed_bytes(0, weight); }), step));
  }
  CHECK_EQ(fake::alive(), 0u);
}

void test_no_memory_for_the_workspace() {
  Fixture f;
  {
    Engine engine(f.api, f.memory);
    f.memory.refuse = true;
    CHECK(error_of([&] { f.run(engine, 8); }) == "out of memory");
    f.memory.refuse = false;
    f.run(engine, 8);
    CHECK_EQ(f.memory.out, 1);
  }
  CHECK_EQ(f.memory.out, 0);
}

void test_what_the_library_cannot_do_is_refused_in_words() {
  const auto why = [](const std::function<void(Problem&)>& change, DType type = DType::kFloat16) {
    Problem p;
    p.rows = 64, p.k = 64, p.tokens = 16, p.x_ld = 64, p.type = type;
    p.out = type == DType::kInt8 ? OutType::kInt8 : type == DType::kFloat8E4M3 ? OutType::kFloat16 : OutType::kFloat16;
    change(p);
    return why_unsupported(p);
  };
  const auto nothing = [](Problem&) {};
  CHECK(why(nothing) == "");
  CHECK(why(nothing, DType::kInt8) == "");
  CHECK(why(nothing, DType::kFloat8E4M3) == "");
  CHECK(why([](Problem& p) { p.x_layout = XLayout::kTokenColumns, p.x_ld = 16; }) == "");
  CHECK(has(why(nothing, DType::kFloat64), "float64 weights"));
  CHECK(has(why(nothing, DType::kFloat32), "float32 weights cannot give float16 results"));
  CHECK(has(why([](Problem& p) { p.rows = 24; }), "multiples of 16, got [24, 64]"));
  CHECK(has(why([](Problem& p) { p.k = 48; }, DType::kInt8), "multiples of 32, got [64, 48]"));
  CHECK(has(why([](Problem& p) { p.rows = 0; }), "multiples of 16"));
  CHECK(has(why([](Problem& p) { p.batches = 0; }), "batches"));
  CHECK(has(why([](Problem& p) { p.tokens = 12; }), "tokens must be a multiple of 8, got 12"));
  CHECK(has(why([](Problem& p) { p.tokens = 8; }, DType::kInt8), "tokens must be a multiple of 16, got 8"));
  CHECK(has(why([](Problem& p) { p.tokens = -8; }), "tokens"));
  CHECK(has(why([](Problem& p) { p.x_ld = 60; }), "elements apart, got 60"));
  CHECK(has(why([](Problem& p) { p.x_ld = 68; }), "elements apart, got 68"));
  CHECK(has(why([](Problem& p) { p.x_layout = XLayout::kTokenColumns; }, DType::kInt8), "last dim contiguous"));
  CHECK(has(why([](Problem& p) { p.out = OutType::kFloat32; }), "float16 weights cannot give float32"));
  CHECK(has(why([](Problem& p) { p.out = OutType::kFloat8E4M3; }, DType::kInt8), "cannot give float8_e4m3fn"));
  CHECK(has(why([](Problem& p) { p.activation = Activation::kGelu; }), "gelu with int8"));
  CHECK(why([](Problem& p) { p.activation = Activation::kGelu; }, DType::kInt8) == "");
  CHECK(has(why([](Problem& p) { p.scales = true; }), "int8 weights only"));
  CHECK(why([](Problem& p) { p.tokens = 0, p.out = OutType::kInt8; }) == "");  // a weight alone

  // And the engine refuses them before it asks the library, misaligned pointers too.
  Fixture f;
  Engine engine(f.api, f.memory);
  CHECK(has(error_of([&] { f.run(engine, 7); }), "tokens must be a multiple of 4, got 7"));
  CHECK_EQ(fake::calls("StructuredDescriptorInit"), 0);
  const float alpha = 1;
  const Problem p = float_problem(16, 16, 8);
  const auto misaligned = [&](int which) {
    engine.matmul(0, nullptr, p, &alpha, f.w.data + (which == 0), f.x.data + (which == 1), f.y.data + (which == 2));
  };
  CHECK(has(error_of([&] { misaligned(0); }), "the compressed weight must begin at a multiple of 16 bytes"));
  CHECK(has(error_of([&] { misaligned(1); }), "x must begin"));
  CHECK(has(error_of([&] { misaligned(2); }), "y must begin"));
  CHECK(has(error_of([&] { engine.compress(0, nullptr, weight_of(p), f.w.data + 1, f.y.data); }), "the weight must"));
  CHECK(has(error_of([&] { engine.set_plan_limit(0); }), "at least one plan"));
}

void test_types() {
  Problem p;
  p.type = DType::kInt8, p.out = OutType::kFloat16;
  CHECK(bias_type(p) == CudaType::kR32F);
  CHECK(compute_type(p.type) == Compute::k32I);
  p.type = DType::kFloat8E4M3, p.out = OutType::kFloat8E4M3;
  CHECK(bias_type(p) == CudaType::kR16F);
  CHECK(c_type(p) == CudaType::kR16F);
  CHECK(cuda_type(p.out) == CudaType::kR8FE4M3);
  CHECK(compute_type(p.type) == Compute::k32F);
  p.out = OutType::kBFloat16;
  CHECK(bias_type(p) == CudaType::kR16BF);
  CHECK_EQ(descriptor_bytes({0, 6, 3}), 13120u);
  CHECK_EQ(descriptor_bytes({0, 7, 1}), 1024u);
  CHECK_EQ(descriptor_bytes({0, 10, 0}), 512u);
  CHECK_EQ(element_bytes(DType::kFloat32) + element_bytes(DType::kBFloat16) + element_bytes(DType::kInt8), 7);
}

// Eight threads, two devices, eight streams, more shapes than plans may stay: the fake ends the program if two of them
// are inside the library on one device at once.
void test_threads() {
  Fixture f;
  {
    Engine engine(f.api, f.memory);
    engine.set_plan_limit(4);
    std::vector<std::thread> threads;
    for (int t = 0; t < 8; ++t)
      threads.emplace_back([&, t] {
        fake::current_device = t % 2;
        Aligned<float> y(64 * 16);
        Aligned<float> bias(16 * 16);
        for (int i = 0; i < 16 * 16; ++i) bias.data[i] = static_cast<float>(t);
        std::mt19937 random(t);
        for (int i = 0; i < 300; ++i) {
          Problem p = float_problem(16, 16, 4 * (1 + random() % 8));
          if (t >= 4) p.bias = bias.data + random() % 200;
          const float alpha = 1;
          engine.matmul(t % 2, stream(t), p, &alpha, f.w.data, f.x.data, y.data);
          CHECK_EQ(y.data[p.tokens * 16 - 1], 16.0f + (p.bias ? t : 0));
          if (i % 50 == 0) engine.statistics();
        }
      });
    for (std::thread& thread : threads) thread.join();
    CHECK_EQ(fake::calls("Init"), 2);
    CHECK_EQ(fake::calls("Matmul"), 2400);
    int64_t seen = 0;
    for (const DeviceStatistics& s : engine.statistics()) {
      seen += s.hits + s.misses;
      CHECK_EQ(s.plans, 4);
      CHECK_EQ(s.misses - s.evictions, 4);
      CHECK_EQ(s.streams, 4);
    }
    CHECK_EQ(seen, 2400);
  }
  CHECK_EQ(fake::alive(), 0u);
  CHECK_EQ(f.memory.out, 0);
}

}  // namespace

int main() {
  test_results();
  test_int8_scales_rows_by_a_vector();
  test_a_hit_is_one_call_of_the_library();
  test_whatever_matters_is_in_the_key();
  test_eviction_destroys_the_least_recently_used();
  test_an_algorithm_has_a_plan_of_its_own();
  test_a_bias_that_stays_gets_a_plan_of_its_own();
  test_a_hundred_addresses_of_a_bias_make_one_plan();
  test_when_no_bias_gets_a_plan_of_its_own();
  test_wide_biases_of_other_types();
  test_a_device_has_one_handle();
  test_a_stream_has_one_workspace();
  test_every_call_that_fails_says_so_and_leaks_nothing();
  test_compression_that_fails_says_so();
  test_no_memory_for_the_workspace();
  test_what_the_library_cannot_do_is_refused_in_words();
  test_types();
  test_threads();
}

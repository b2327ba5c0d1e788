#include "engine.h"

#include <optional>
#include <stdexcept>
#include <string>
#include <unordered_set>

#include "error.h"
#include "handle.h"

namespace nms::lt {
namespace {

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kAlignment == 0; }

void check_aligned(const void* pointer, const char* name) {
  if (!is_aligned(pointer))
    throw Error(kInvalidValue, std::string("cuSPARSELt: ") + name + " must begin at a multiple of " +
                                   std::to_string(kAlignment) + " bytes");
}

// The products that are remembered for having been called with one bias; a collision makes a plan a call early.
constexpr size_t kMostSeen = 4096;

}  // namespace

// Plans go before the handle they were made with.
struct Engine::Device {
  std::mutex mutex;
  std::optional<Handle> handle;
  PlanCache plans;
  std::map<void*, Workspace> workspaces, biases;  // of each stream
  std::unordered_set<size_t> seen;                // hashes of products with a bias
  int64_t bias_copies = 0;

  const Opaque* ready(const Api& api, int device) {
    if (!handle) handle.emplace(api, device);
    return handle->get();
  }

  void* workspace(Memory& memory, int device, void* stream, size_t bytes) {
    return workspaces.try_emplace(stream, memory).first->second.at_least(device, stream, bytes);
  }

  bool seen_before(const Problem& problem) {
    if (seen.size() >= kMostSeen) seen.clear();
    return !seen.insert(ProblemHash{}(problem)).second;
  }

  // The plan of a product with a bias, which lies where the plan reads it once this has returned. Work on one stream is
  // done in turn, and the lock is held until the product is launched: no bias is overwritten before it was read.
  const Plan& plan_with_bias(const Api& api, Memory& memory, int device, void* stream, const Problem& problem,
                             size_t limit) {
    if (is_aligned(problem.bias)) {
      if (const Plan* own = plans.find(problem)) return *own;
      if (seen_before(problem) && plans.size() < limit && !memory.is_capturing(stream))
        return plans.get(api, handle->get(), problem, limit);
    }
    const size_t bytes = static_cast<size_t>(problem.rows) * element_bytes(bias_type(problem));
    Problem moved = problem;
    moved.bias = biases.try_emplace(stream, memory).first->second.at_least(device, stream, bytes);
    const Plan& shared = plans.get(api, handle->get(), moved, limit);
    memory.copy(stream, const_cast<void*>(moved.bias), problem.bias, bytes);
    ++bias_copies;
    return shared;
  }
};

Engine::Engine(const Api& api, Memory& memory) : api_(api), memory_(memory) {}
Engine::~Engine() = default;

Engine::Device& Engine::at(int device) {
  const std::lock_guard lock(mutex_);
  std::unique_ptr<Device>& place = devices_[device];
  if (!place) place = std::make_unique<Device>();
  return *place;  // devices are never removed
}

size_t Engine::compressed_bytes(int device, const Problem& weight) {
  Device& on = at(device);
  const std::lock_guard lock(on.mutex);
  const Opaque* handle = on.ready(api_, device);
  const WeightDescriptor w(api_, handle, weight);
  size_t bytes = 0, scratch = 0;
  check(api_, api_.SpMMACompressedSize2(handle, w.get(), &bytes, &scratch), "SpMMACompressedSize2", describe(weight));
  return bytes;
}

void Engine::compress(int device, void* stream, const Problem& weight, const void* dense, void* blob) {
  check_aligned(dense, "the weight");
  check_aligned(blob, "the compressed weight");
  Device& on = at(device);
  const std::lock_guard lock(on.mutex);
  const Opaque* handle = on.ready(api_, device);
  const WeightDescriptor w(api_, handle, weight);
  size_t bytes = 0, scratch = 0;
  check(api_, api_.SpMMACompressedSize2(handle, w.get(), &bytes, &scratch), "SpMMACompressedSize2", describe(weight));
  check(api_,
        api_.SpMMACompress2(handle, w.get(), /*sparse_is_a=*/1, Operation::kNone, dense, blob,
                            on.workspace(memory_, device, stream, scratch), stream),
        "SpMMACompress2", describe(weight));
}

void Engine::matmul(int device, void* stream, const Problem& problem, const void* alpha, const void* blob,
                    const void* x, void* y) {
  check_aligned(blob, "the compressed weight");
  check_aligned(x, "x");
  check_aligned(y, "y");
  const size_t limit = plan_limit();
  Device& on = at(device);
  const std::lock_guard lock(on.mutex);
  const Opaque* handle = on.ready(api_, device);
  const Plan& plan = problem.bias ? on.plan_with_bias(api_, memory_, device, stream, problem, limit)
                                  : on.plans.get(api_, handle, problem, limit);
  void* workspace = on.workspace(memory_, device, stream, plan.workspace_bytes());
  // beta is 0, so C is never read; the library wants a valid pointer all the same.
  const float beta = 0;
  if (const Status status =
          api_.Matmul(handle, plan.get(), alpha, blob, x, &beta, y, y, workspace, &stream, /*stream_count=*/1))
    check(api_, status, "Matmul", describe(problem));  // the description is made only when there is something to say
}

int Engine::algorithms(int device, const Problem& problem) {
  const size_t limit = plan_limit();
  Device& on = at(device);
  const std::lock_guard lock(on.mutex);
  return on.plans.get(api_, on.ready(api_, device), problem, limit).algorithms();
}

size_t Engine::plan_limit() {
  const std::lock_guard lock(mutex_);
  return plan_limit_;
}

void Engine::set_plan_limit(size_t limit) {
  if (limit == 0) throw std::invalid_argument("cuSPARSELt: at least one plan must be kept");
  const std::lock_guard lock(mutex_);
  plan_limit_ = limit;  // a device shrinks to it at its next new plan
}

void Engine::clear(int device) {
  Device& on = at(device);
  const std::lock_guard lock(on.mutex);
  on.plans.clear();
  on.workspaces.clear();
  on.biases.clear();
  on.seen.clear();
  on.handle.reset();
}

std::vector<DeviceStatistics> Engine::statistics() {
  std::vector<DeviceStatistics> all;
  const std::lock_guard lock(mutex_);
  for (const auto& [index, device] : devices_) {
    const std::lock_guard device_lock(device->mutex);
    const PlanCache::Counts counts = device->plans.counts();
    DeviceStatistics& one = all.emplace_back();
    one.device = index;
    one.plans = static_cast<int64_t>(device->plans.size());
    one.hits = counts.hits;
    one.misses = counts.misses;
    one.evictions = counts.evictions;
    one.streams = static_cast<int64_t>(device->workspaces.size());
    one.bias_copies = device->bias_copies;
    for (const auto* blocks : {&device->workspaces, &device->biases})
      for (const auto& [stream, block] : *blocks) one.workspace_bytes += static_cast<int64_t>(block.total_bytes());
  }
  return all;
}

}  // namespace nms::lt

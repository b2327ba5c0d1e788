// What ops and bindings call: products and compression on any device, with one handle, one plan cache and one workspace
// per stream for each device.
//
// Every member function may be called from any thread. Calls that go to the library on one device are made one after
// the other (the library promises no thread safety); they launch and return, so the lock is held for microseconds. The
// caller has made `device` the current CUDA device. After the first call of a problem, matmul() looks its plan up and
// makes one call of the library: it allocates nothing, plans nothing and waits for nothing, so CUDA graphs can capture
// it.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "api.h"
#include "plan_cache.h"
#include "problem.h"
#include "workspace.h"

namespace nms::lt {

struct DeviceStatistics {
  int device = 0;
  int64_t plans = 0;  // alive now
  int64_t hits = 0, misses = 0, evictions = 0;
  int64_t streams = 0;          // that have a workspace
  int64_t workspace_bytes = 0;  // of all of them, with what biases are copied to
  int64_t bias_copies = 0;      // products whose bias was copied to where a plan reads it
};

class Engine {
 public:
  static constexpr size_t kDefaultPlanLimit = 256;

  // Both must outlive the engine.
  Engine(const Api& api, Memory& memory);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Bytes of the compressed weight, as the library asks for them. `weight` is a Problem with tokens = 0.
  size_t compressed_bytes(int device, const Problem& weight);

  // dense: [batches, rows, k] that holds at most 2 of 4 (float32: 1 of 2) nonzeros. blob: compressed_bytes() bytes.
  // Both aligned to kAlignment. Launched on the stream.
  void compress(int device, void* stream, const Problem& weight, const void* dense, void* blob);

  // y = activation(alpha * x W^T + bias). alpha: one float on the host, or float32[rows] on the device if
  // problem.scales. Launched on the stream.
  //
  // A plan holds the address of its bias. One that is there in every call, a parameter, gets a plan of its own when it
  // is seen for the second time, as long as no other plan has to make room. Any other bias, such as one that autocast
  // casts anew in each call, is copied to a place that belongs to the stream, which all such products on it share. So
  // plans do not grow in number with addresses, and no plan is made for an address while a graph is captured.
  void matmul(int device, void* stream, const Problem& problem, const void* alpha, const void* blob, const void* x,
              void* y);

  // How many algorithm ids the library has for this problem.
  int algorithms(int device, const Problem& problem);

  // Plans kept per device.
  size_t plan_limit();
  void set_plan_limit(size_t limit);

  // Destroys a device's plans, workspaces and handle. Nothing of them may be in flight, nor in a graph still to run.
  void clear(int device);

  std::vector<DeviceStatistics> statistics();

 private:
  struct Device;

  Device& at(int device);

  const Api& api_;
  Memory& memory_;
  std::mutex mutex_;  // of the members below, not of the devices in them
  size_t plan_limit_ = kDefaultPlanLimit;
  std::map<int, std::unique_ptr<Device>> devices_;
};

}  // namespace nms::lt

#include "process.h"

#include <unordered_map>

#include "../torch_utils.h"

namespace nms::lt {
namespace {

// Blocks are byte tensors: torch's allocator counts them, and a CUDA graph that is being captured may allocate them.
class TorchMemory : public Memory {
 public:
  void* allocate(int device, void*, size_t bytes) override {
    const torch::stable::Device cuda(torch::headeronly::DeviceType::CUDA,
                                     static_cast<torch::stable::DeviceIndex>(device));
    const Tensor block = torch::stable::empty({static_cast<int64_t>(bytes)}, ScalarType::Byte, std::nullopt, cuda);
    void* data = block.mutable_data_ptr();
    const std::lock_guard lock(mutex_);
    blocks_.emplace(data, block);
    return data;
  }

  void release(void* block) noexcept override {
    const std::lock_guard lock(mutex_);
    blocks_.erase(block);
  }

  void copy(void* stream, void* to, const void* from, size_t bytes) override { calls.copy(stream, to, from, bytes); }
  bool is_capturing(void* stream) override { return calls.is_capturing(stream); }

  StreamCalls calls;

 private:
  std::mutex mutex_;
  std::unordered_map<void*, Tensor> blocks_;
};

// Never destroyed: at the end of the process the CUDA driver may be gone before us.
struct Process {
  std::mutex mutex;
  Loaded loaded;
  TorchMemory memory;
  std::unique_ptr<Engine> engine;
};

Process& process() {
  static Process* instance = new Process;
  return *instance;
}

}  // namespace

Opened open(const std::vector<std::string>& paths) {
  Process& p = process();
  const std::lock_guard lock(p.mutex);
  if (!p.loaded.api) {
    p.loaded = load(paths.empty() ? std::vector<std::string>{"libcusparseLt.so.0"} : paths);
    if (p.loaded.api) p.engine = std::make_unique<Engine>(*p.loaded.api, p.memory);
  }
  if (!p.loaded.api) return {false, {}, "", p.loaded.reason};
  return {true, p.loaded.api->version, p.loaded.api->path, ""};
}

void set_stream_calls(const StreamCalls& calls) { process().memory.calls = calls; }

Engine* engine_if_any() {
  Process& p = process();
  const std::lock_guard lock(p.mutex);
  return p.engine.get();
}

Engine& engine() {
  if (Engine* ready = engine_if_any()) return *ready;
  const Opened opened = open();
  if (!opened.loaded) throw std::runtime_error("nmsparse: " + opened.reason);
  return *engine_if_any();
}

}  // namespace nms::lt

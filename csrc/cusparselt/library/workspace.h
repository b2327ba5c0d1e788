// The scratch memory of one stream on one device: kept from call to call, so that none allocates.
//
// Calls on one stream run one after the other and share it. A block that has become too small is kept until clear():
// kernels in flight and captured CUDA graphs still name it. Sizes are powers of two, so that what is kept beside the
// current block is never more than as much again.
#pragma once

#include <bit>
#include <cstddef>
#include <vector>

namespace nms::lt {

// Device memory, as whoever owns the device gives it out, and the one thing we do to it ourselves.
class Memory {
 public:
  virtual ~Memory() = default;
  // At least `bytes` on `device`, aligned to 256 bytes, for work on `stream`. Throws when there is none.
  virtual void* allocate(int device, void* stream, size_t bytes) = 0;
  virtual void release(void* block) noexcept = 0;
  // Copies device memory, as work on the stream. Throws when it cannot be launched.
  virtual void copy(void* stream, void* to, const void* from, size_t bytes) = 0;
  // Whether work on the stream is being recorded as a CUDA graph.
  virtual bool is_capturing(void* stream) = 0;
};

class Workspace {
 public:
  explicit Workspace(Memory& memory) : memory_(memory) {}
  ~Workspace() {
    for (void* block : blocks_) memory_.release(block);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // Null when no byte is needed.
  void* at_least(int device, void* stream, size_t bytes) {
    if (bytes == 0) return nullptr;
    if (bytes > bytes_) {
      const size_t rounded = std::bit_ceil(bytes < kSmallest ? kSmallest : bytes);
      blocks_.reserve(blocks_.size() + 1);  // first, so that no block is lost
      blocks_.push_back(memory_.allocate(device, stream, rounded));
      bytes_ = rounded;
      total_bytes_ += rounded;
    }
    return blocks_.back();
  }

  size_t total_bytes() const { return total_bytes_; }

 private:
  static constexpr size_t kSmallest = 1 << 16;

  Memory& memory_;
  std::vector<void*> blocks_;
  size_t bytes_ = 0, total_bytes_ = 0;
};

}  // namespace nms::lt

// Everything the library needs for one Problem, made once: the descriptors point at each other and at themselves, so
// they are owned together, at addresses that never change, and destroyed together.
#pragma once

#include <cstddef>
#include <memory>

#include "api.h"
#include "problem.h"

namespace nms::lt {

// One opaque object inside memory that somebody else owns; destroyed if it was ever initialised.
class Descriptor {
 public:
  explicit Descriptor(void* memory) : memory_(memory) {}
  ~Descriptor() {
    if (destroy_) destroy_(memory_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;

  Opaque* get() { return memory_; }
  const Opaque* get() const { return memory_; }
  // The library has filled it: from now on it is destroyed by `destroy` (null in versions that have none).
  void filled(Status (*destroy)(const Opaque*)) { destroy_ = destroy; }

 private:
  void* memory_;
  Status (*destroy_)(const Opaque*) = nullptr;
};

// Aligned, zeroed memory for `count` descriptors of this version.
class DescriptorMemory {
 public:
  DescriptorMemory(const Api& api, int count);
  void* operator[](int i) const { return bytes_.get() + i * step_; }

 private:
  struct Free {
    void operator()(std::byte* bytes) const;
  };
  size_t step_;
  std::unique_ptr<std::byte, Free> bytes_;
};

// The weight's descriptor alone: enough to ask for the compressed size and to compress.
class WeightDescriptor {
 public:
  // handle: of the current device. Throws Error.
  WeightDescriptor(const Api& api, const Opaque* handle, const Problem& problem);
  const Opaque* get() const { return w_.get(); }

 private:
  DescriptorMemory memory_;
  Descriptor w_;
};

class Plan {
 public:
  // handle: of the current device, and must outlive the plan. Throws Error; whatever had been made by then is
  // destroyed.
  Plan(const Api& api, const Opaque* handle, const Problem& problem);

  size_t workspace_bytes() const { return workspace_bytes_; }
  int algorithms() const { return algorithms_; }  // ids are 0 .. algorithms() - 1
  const Opaque* get() const { return plan_.get(); }

 private:
  void describe_matrices(const Api& api, const Opaque* handle, const Problem& problem);
  void describe_product(const Api& api, const Opaque* handle, const Problem& problem);
  void choose_algorithm(const Api& api, const Opaque* handle, const Problem& problem);

  DescriptorMemory memory_;
  // In the order they are made; destroyed from the last to the first.
  Descriptor w_, x_, c_, y_, product_, selection_, plan_;
  size_t workspace_bytes_ = 0;
  int algorithms_ = 0;
};

}  // namespace nms::lt

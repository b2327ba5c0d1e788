// The library's handle of one device. Made while that device is current; a handle serves no other.
#pragma once

#include <string>

#include "error.h"
#include "plan.h"

namespace nms::lt {

class Handle {
 public:
  Handle(const Api& api, int device) : memory_(api, 1), handle_(memory_[0]) {
    check(api, api.Init(handle_.get()), "Init", "device " + std::to_string(device));
    handle_.filled(api.Destroy);
  }
  const Opaque* get() const { return handle_.get(); }

 private:
  DescriptorMemory memory_;
  Descriptor handle_;
};

}  // namespace nms::lt

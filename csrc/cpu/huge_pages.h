// Large outputs in huge pages.
//
// Every page of new memory is zeroed by the system when it is first touched, one interrupt a page. For an output of
// tens of megabytes that takes several times as long as the operation that fills it; with huge pages a tenth of it.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../torch_utils.h"

namespace nms {

// Asks for huge pages behind a tensor that was just made, and returns it. A wish: the system may ignore it.
inline Tensor on_huge_pages(const Tensor& fresh) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(fresh.const_data_ptr());
  const uintptr_t end = begin + static_cast<uintptr_t>(fresh.numel()) * static_cast<uintptr_t>(fresh.element_size());
  const uintptr_t first = (begin + kPage - 1) & ~(kPage - 1);
  const uintptr_t last = end & ~(kPage - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return fresh;
}

}  // namespace nms

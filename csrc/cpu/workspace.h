// Working memory of the packed products, and where the memory of their weights lies.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../torch_utils.h"

namespace nms {

// With one row of x a product is as fast as its weight comes from memory, and in pages of 4 KiB a good part of that
// time goes into finding them. Only asked for memory that nobody has touched yet, and only a wish.
inline void prefer_huge_pages([[maybe_unused]] const void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096, kHugePage = uintptr_t{2} << 20;
  const uintptr_t first = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = (first + kPage - 1) / kPage * kPage;
  const uintptr_t end = (first + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (end > begin && end - begin >= kHugePage) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

inline void prefer_huge_pages(const Tensor& t) {
  prefer_huge_pages(t.const_data_ptr(), t.numel() * static_cast<int64_t>(t.element_size()));
}

// A new tensor for a weight that is read from memory again and again: begins where a huge page does, so that all of it
// can lie in such pages. Where a tensor begins otherwise, up to 4 MiB lie in small ones: of an int8 weight, a third.
inline Tensor new_weight(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t kHugePage = size_t{2} << 20;
  int64_t bytes = static_cast<int64_t>(new_empty(like, {0}, dtype).element_size());
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 0;) {
    bytes *= sizes[d];
    if (d + 1 < sizes.size()) strides[d] = strides[d + 1] * sizes[d + 1];
  }
  void* memory = nullptr;
  if (bytes >= static_cast<int64_t>(kHugePage) && posix_memalign(&memory, kHugePage, static_cast<size_t>(bytes)) == 0) {
    madvise(memory, static_cast<size_t>(bytes), MADV_HUGEPAGE);
    return torch::stable::from_blob(memory, sizes, strides, like.device(), dtype, &std::free);
  }
#endif
  return new_empty(like, sizes, dtype);
}

// Memory for packed x and for sums, which the thread that needed it keeps: pages fresh from the system cost a tenth of
// a product that works through them once. Only the unusually large is given back.
class Workspace {
 public:
  uint8_t* get(int64_t bytes) {
    if (bytes > bytes_) {
      memory_.reset();
      memory_.reset(static_cast<uint8_t*>(::operator new(static_cast<size_t>(bytes), std::align_val_t{kAlignment})));
      bytes_ = bytes;
      prefer_huge_pages(memory_.get(), bytes);
    }
    return memory_.get();
  }
  void release_large() {
    constexpr int64_t kKept = int64_t{32} << 20;
    if (bytes_ <= kKept) return;
    memory_.reset();
    bytes_ = 0;
  }

 private:
  static constexpr size_t kAlignment = 64;
  struct Free {
    void operator()(uint8_t* p) const { ::operator delete(p, std::align_val_t{kAlignment}); }
  };
  std::unique_ptr<uint8_t, Free> memory_;
  int64_t bytes_ = 0;
};

}  // namespace nms

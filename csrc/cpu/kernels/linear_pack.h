// Between the packed form (values and indices, core/packed.h), the panel form and the dense weight. Torch-free.
#pragma once

#include <cstdint>

#include "../../core/panel_layout.h"

namespace nms {

struct PanelForm {
  void* values;  // [panels, ...], see core/panel_layout.h
  uint32_t* indices;
  int element_size;
  int64_t rows, k;
  PanelLayout layout;
};

// Fills panels [first, last). values [rows, groups * n], indices [rows, index bytes]: contiguous. Indices that no
// encoder writes give a wrong form, but one that is as safe to use as any other.
void pack_panels(const PanelForm& form, const void* values, const uint8_t* indices, int64_t first, int64_t last);
void pack_panels_avx512(const PanelForm& form, const void* values, const uint8_t* indices, int64_t first,
                        int64_t last);  // x86-64 only: the same, for processors that have it
using PackPanelsFn = decltype(&pack_panels);

// The packed rows of panels [first, last) again: values [rows, groups * n] and indices [rows, index bytes], both
// contiguous. The same bits as pack_panels was given.
void restore_panels(const PanelForm& form, void* values, uint8_t* indices, int64_t first, int64_t last);

// The dense rows [rows, k], contiguous, of panels [first, last).
void unpack_panels(const PanelForm& form, void* dense, int64_t first, int64_t last);
void unpack_panels_avx512(const PanelForm& form, void* dense, int64_t first,
                          int64_t last);  // x86-64 only: the same, for processors that have it
using UnpackPanelsFn = decltype(&unpack_panels);

}  // namespace nms

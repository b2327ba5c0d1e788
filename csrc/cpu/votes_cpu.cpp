// group_thresholds, foreach_vote: what DominoSearch asks the groups of a weight.
#include <atomic>

#include "kernels/kernels.h"
#include "panels.h"

namespace nms {
namespace {

using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;

Tensor group_thresholds_cpu(const Tensor& w, int64_t m, int64_t dim) {
  check_thresholded(w, m, dim);
  NMS_CHECK(m >= 2, "m must be 2 or more, got ", m);
  Tensor thresholds = new_empty(w, moved_last(sizes_of(w), dim, w.size(dim) / m), w.scalar_type());
  const DType dtype = dtype_of(w, "w");
  const int64_t element = static_cast<int64_t>(w.element_size());
  const Panels panels = make_panels(w, nullptr, dim, m);
  const int64_t groups = panels.k / m;
  parallel_tiles(panels, m, [&](const Tile& tile) {
    group_thresholds(dtype, const_bytes_of(w) + tile.a * element, panels.a.row, panels.a.k,
                     bytes_of(thresholds) + (tile.first_row * groups + tile.first_k / m) * element, groups, tile.rows,
                     tile.k, static_cast<int>(m));
  });
  return thresholds;
}

int64_t count_votes(const Tensor& w, const Tensor& thresholds, int64_t n, int64_t m, int64_t dim) {
  const int64_t element = static_cast<int64_t>(w.element_size());
  const VoteFn vote = kernels().vote[element == 8 ? 0 : 1];
  const Panels panels = make_panels(w, nullptr, dim, m);
  const int64_t groups = panels.k / m;
  std::atomic<int64_t> votes{0};
  parallel_tiles(panels, m, [&](const Tile& tile) {
    VotePanel p;
    p.w = const_bytes_of(w) + tile.a * element;
    p.w_row = panels.a.row;
    p.w_k = panels.a.k;
    p.thresholds = const_bytes_of(thresholds) + (tile.first_row * groups + tile.first_k / m) * element;
    p.thresholds_row = groups;
    p.rows = tile.rows;
    p.k = tile.k;
    p.n = static_cast<int>(n);
    p.m = static_cast<int>(m);
    votes.fetch_add(vote(p), std::memory_order_relaxed);
  });
  return votes.load();
}

void foreach_vote_cpu(const Tensors& ws, const Tensors& thresholds, const Ints& ns, const Ints& ms, const Ints& dims,
                      const Tensor& counts) {
  for (size_t length : {thresholds.size(), ns.size(), ms.size(), dims.size()})
    NMS_CHECK(length == ws.size(), "all lists must have one entry a weight, got ", length, " and ", ws.size());
  check_counts(counts, ws.size());
  NMS_CHECK(counts.is_cpu(), "counts must be on the device of ws");
  auto* votes = static_cast<int64_t*>(counts.mutable_data_ptr());
  for (size_t i = 0; i < ws.size(); ++i) {
    check_thresholds(ws[i], thresholds[i], ms[i], dims[i]);
    votes[i] = count_votes(ws[i], thresholds[i], ns[i], ms[i], dims[i]);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nmsparse, CPU, m) {
  m.impl("group_thresholds", TORCH_BOX(&group_thresholds_cpu));
  m.impl("foreach_vote", TORCH_BOX(&foreach_vote_cpu));
}

}  // namespace nms

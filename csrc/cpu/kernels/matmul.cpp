// The product of x with a packed weight along its rows: the loops around dense blocks.
#include "matmul.h"

#include <algorithm>
#include <cstring>

namespace nms {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t sum_size(const MatmulProblem& problem) {
  return problem.element_size == int{sizeof(double)} ? int64_t{sizeof(double)} : int64_t{sizeof(float)};
}

int64_t block_bytes(const MatmulProblem& problem) {
  return int64_t{kBlockUnits} * kTileStride * problem.kernels->number_bytes;
}

int64_t batch_parts(const MatmulProblem& problem) { return ceil_div(problem.batch, kStripBatch); }

// Some columns of y for some rows of x.
class Strip {
 public:
  Strip(const MatmulProblem& problem, const void* packed, int64_t index, uint8_t* memory)
      : p_(problem),
        packed_(static_cast<const uint8_t*>(packed)),
        dense_rows_(problem.kernels->dense_rows(problem.layout)),
        block_(memory),
        sums_(memory + block_bytes(problem)) {
    // Parts of the batch one after the other: what they read of W is then in the caches.
    first_step_ = index / batch_parts(p_) * p_.strip_steps();
    steps_ = std::min(p_.strip_steps(), p_.layout.steps - first_step_);
    first_row_ = index % batch_parts(p_) * kStripBatch;
    batch_ = std::min<int64_t>(kStripBatch, p_.batch - first_row_);
  }

  void run() {
    const int64_t column = first_step_ * p_.layout.step_inputs();
    if (column >= p_.k) return;  // steps that only fill up a word
    std::memset(sums_, 0, static_cast<size_t>(batch_ * kStripInputs * sum_size(p_)));
    for (int64_t block = 0; block < p_.blocks(); ++block) multiply(block);
    StoreStrip s;
    s.sums = sums_;
    s.batch = batch_;
    s.y = static_cast<uint8_t*>(p_.y) + (first_row_ * p_.k + column) * p_.element_size;
    s.y_row = p_.k;
    s.columns = static_cast<int>(std::min(steps_ * p_.layout.step_inputs(), p_.k - column));
    p_.kernels->store(s);
  }

 private:
  void multiply(int64_t block) {
    const int64_t first_row = block * p_.block_rows();
    const int64_t rows = std::min(p_.block_rows(), p_.rows - first_row);
    const int64_t panel_bytes = p_.layout.panel_values() * p_.element_size;
    DenseRows d;
    d.first_step = first_step_;
    d.steps = steps_;
    d.early_values = panel_bytes * (p_.block_rows() / kPanelRows);
    d.early_words = p_.layout.panel_words() * (p_.block_rows() / kPanelRows);
    d.layout = &p_.layout;
    for (int64_t row = 0; row < rows; row += kPanelRows) {
      const int64_t panel = (first_row + row) / kPanelRows;
      d.values = static_cast<const uint8_t*>(p_.values) + panel * panel_bytes +
                 first_step_ * p_.layout.slots * p_.layout.slot_values() * p_.element_size;
      d.indices = p_.indices + panel * p_.layout.panel_words();
      d.rows = block_ + row / p_.kernels->unit_rows * kTileStride * p_.kernels->number_bytes;
      dense_rows_(d);
    }
    BlockProduct b;
    b.x = packed_ + block * p_.packed_block_bytes() + first_row_ * kBlockUnits * p_.kernels->number_bytes;
    b.batch = batch_;
    b.block = block_;
    b.units = ceil_div(rows, p_.kernels->unit_rows);
    b.sums = sums_;
    p_.kernels->product(b);
  }

  const MatmulProblem& p_;
  const uint8_t* packed_;
  DenseRowsFn dense_rows_;
  uint8_t* block_;
  uint8_t* sums_;
  int64_t first_step_, steps_, first_row_, batch_;
};

}  // namespace

int64_t MatmulProblem::strips() const { return ceil_div(layout.steps, strip_steps()) * batch_parts(*this); }

void pack_matmul_input(const MatmulProblem& problem, int64_t first, int64_t last, void* packed) {
  for (int64_t block = first; block < last; ++block) {
    const int64_t row = block * problem.block_rows();
    PackUnits p;
    p.x = static_cast<const uint8_t*>(problem.x) + row * problem.x_r * problem.element_size;
    p.x_row = problem.x_row;
    p.x_r = problem.x_r;
    p.batch = problem.batch;
    p.count = static_cast<int>(std::min(problem.block_rows(), problem.rows - row));
    p.packed = static_cast<uint8_t*>(packed) + block * problem.packed_block_bytes();
    problem.kernels->pack(p);
  }
}

int64_t strip_memory(const MatmulProblem& problem) {
  return block_bytes(problem) + std::min<int64_t>(kStripBatch, problem.batch) * kStripInputs * sum_size(problem);
}

void multiply_strips(const MatmulProblem& problem, const void* packed, int64_t first, int64_t last, void* memory) {
  // Columns of a block behind its strip are read, though not stored.
  std::memset(memory, 0, static_cast<size_t>(block_bytes(problem)));
  for (int64_t i = first; i < last; ++i) Strip(problem, packed, i, static_cast<uint8_t*>(memory)).run();
}

}  // namespace nms

// Copies of blocks that lie apart (src/ops/select.rs).
#include "prelude.cuh"
#include "matrix.cuh"

enum { THREADS = 256 };

// Where block (a, b) begins: `outer` bytes from one a to the next, `inner` from one b to the next.
struct Steps {
  size_t outer, inner;
  DEVICE size_t at(size_t a, size_t b) const { return a * outer + b * inner; }
};

template <typename Unit>
DEVICE void copy(uint8_t* to, const uint8_t* from, size_t outer, size_t inner, size_t bytes, Steps to_steps, Steps from_steps) {
  over_matrix(outer * inner, bytes / sizeof(Unit), [&](size_t block, size_t unit) {
    size_t a = inner == 1 ? block : block / inner, b = inner == 1 ? 0 : block % inner, byte = unit * sizeof(Unit);
    *reinterpret_cast<Unit*>(to + to_steps.at(a, b) + byte) = *reinterpret_cast<const Unit*>(from + from_steps.at(a, b) + byte);
  });
}

// Copies outer x inner blocks of `bytes` each. A thread copies 16 bytes at a time where all addresses, steps and `bytes` are multiples of
// that, else 4 or 2; neighbours copy neighbouring units, a grid strides over all. Each byte is read once and written once. Everything is
// a multiple of 2.
KERNEL(THREADS)
select_blocks(uint8_t* to, const uint8_t* from, size_t outer, size_t inner, size_t bytes, size_t to_outer, size_t to_inner,
              size_t from_outer, size_t from_inner) {
  Steps to_steps = {to_outer, to_inner}, from_steps = {from_outer, from_inner};
  size_t all = reinterpret_cast<size_t>(to) | reinterpret_cast<size_t>(from) | bytes | to_outer | to_inner | from_outer | from_inner;
  if (all % 16 == 0) copy<uint4>(to, from, outer, inner, bytes, to_steps, from_steps);
  else if (all % 4 == 0) copy<uint32_t>(to, from, outer, inner, bytes, to_steps, from_steps);
  else copy<uint16_t>(to, from, outer, inner, bytes, to_steps, from_steps);
}

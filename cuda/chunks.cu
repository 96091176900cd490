// The second pass of sums by the chunk rule: see chunks.cuh.
#include "prelude.cuh"
#include "chunks.cuh"

// Sequences whose sums are under way at once.
enum { SEQUENCES = 4 };

// dw f32 [chunks, c] += the partials of each sequence's part, one sequence after the other.
//
// Block (x, y) has columns 32 x .. of chunk y; a warp reads 128 bytes of a partial. Warp w adds partials w, w + 8, ... of a part, then the
// eight sums are added in the order of warps. Moves 4 bytes per partial, which the cache still holds, and 8 per element of dw.
KERNEL(SUM_THREADS) chunks_combine(float* dw, const float* partials, size_t sequences, size_t blocks, size_t c) {
  __shared__ float of_warps[SEQUENCES][SUM_WARPS][WARP];
  size_t chunk = blockIdx.y, chunks = gridDim.y, column = size_t(blockIdx.x) * WARP + lane();
  bool inside = column < c, adds = warp() == 0 && inside;
  float total = adds ? dw[chunk * c + column] : 0.0f;
  size_t part_size = blocks * c, sequence_size = chunks * part_size;
  const float* of_part = partials + chunk * part_size + column;
  for (size_t first = 0; first < sequences; first += SEQUENCES, of_part += SEQUENCES * sequence_size) {
    float sums[SEQUENCES] = {};
    int present = int(min(sequences - first, size_t(SEQUENCES)));
    // Four loads under way in either case, and the same order of additions.
    if (present == 1) {
#pragma unroll 4
      for (size_t block = warp(); inside && block < blocks; block += SUM_WARPS) sums[0] += of_part[block * c];
    } else {
#pragma unroll 1
      for (size_t block = warp(); inside && block < blocks; block += SUM_WARPS) {
#pragma unroll
        for (int i = 0; i < SEQUENCES; i++) {
          if (i < present) sums[i] += of_part[i * sequence_size + block * c];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < SEQUENCES; i++) of_warps[i][warp()][lane()] = sums[i];
    __syncthreads();
    for (int i = 0; adds && i < present; i++) {
      float sum = of_warps[i][0][lane()];
#pragma unroll
      for (int w = 1; w < SUM_WARPS; w++) sum += of_warps[i][w][lane()];
      total += sum;
    }
    __syncthreads();
  }
  if (adds) dw[chunk * c + column] = total;
}

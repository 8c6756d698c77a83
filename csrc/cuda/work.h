// Shared by all kernels: the workspace in device memory and the sizes of tiles.
//
// How the loss goes over the device, everything in stream order:
// 1. Prologue (prologue.cuh): rows and columns sorted by label, those that take no part last; x^ as one or two halves
//    for each element; for each row the range of columns of its label; sums of x^ over each tile of rows.
// 2. For each rectangle of up to kRectangle x kRectangle tiles (symmetric: those that reach above the diagonal):
//    similarity (similarity.cuh): products, hard pairs counted and summed, one bit kept for each pair of a mixed tile;
//    for fp32 accuracy after a screen (screen.cuh) that finds the tiles in which there can be any;
//    masked sums (masked_sum.cuh): M X^ and M^T X^ added to the sums G+ and G-.
// 3. Epilogue (epilogue.cuh): loss, counts; gradients from G+, G- and the counts, or of either penalty from G+ or G-,
//    in the order of the input.
// Launches: six in all up to 4,096 rows; beyond that one more for each doubling of the sorted runs, and beyond 24,576 rows
// (symmetric, kRectangle tiles) two for each further rectangle, of which there are O((N / 24,576)^2). A screen takes two
// more for each rectangle.
#pragma once

#include <cstdint>

#include "../problem.h"
#include "ptx.cuh"

namespace tcm::cuda {

constexpr int kTile = 128;     // rows and columns of a tile of similarities
constexpr int kDepth = 64;     // columns of x^ in one step of a product; x^ is padded to a multiple
constexpr int kSlice = 128;    // columns of x^ in one tile of a masked sum
constexpr int kThreads = 256;  // of every block of threads
constexpr int kWarps = kThreads / 32;
constexpr int kRectangle = 192;   // tiles on a side of a rectangle at most: 151 MB of masks
constexpr int kGroup = 8;         // row tiles that neighbouring blocks of threads share: see `TileOrder`
constexpr int kScreenFrom = 4;    // tiles (on Hopper pairs) for each block of threads from which on there is a screen
constexpr int kHalf = kTile / 2;  // rows of a half of a tile
constexpr int kSparse = 64;       // hard pairs up to which a tile's masked sum goes pair by pair
constexpr int kChunk = 1024;      // labels sorted by one comparison of all with all, if there are more than kOneChunk
constexpr int kOneChunk = 4096;

constexpr float kLowScale = 2048.0f;  // x^ = high + low / kLowScale: low then has the exponents of high

// Rows or columns. "Sorted" is by label, then by index; a row with a negative label takes no part and comes last.
struct Embeddings {
  const void* x;     // [n, d]
  const int64_t* y;  // [n]
  int64_t n;
  int tiles;           // of kTile rows; arrays of sorted rows are padded to them
  uint64_t* label[2];  // [n] sorted; [1] is room to sort
  int32_t* order[2];   // [n] input row of a sorted row; [1] is room to sort
  int32_t* position;   // [n] sorted row of an input row
  int32_t* first;      // [n] the positives of a sorted row: sorted rows first <= j < last of the other set
  int32_t* last;       // [n]
  int32_t* own;        // [n] sorted row of the other set that is this row itself; -1: none
  double* inverse;     // [n] 1 / max(|x|, kEps), 0 for a zero row
  Half* unit;          // [parts, tiles * kTile, width] x^, high and low part; 0 where there is no row
  float* tile_sum;     // [tiles, width] sum of x^ over a tile
  float* sum[2];       // [tiles * kTile, width] G+ and G-; null: no gradient wanted
  uint8_t* touched;    // [2, tiles, slices] whether a tile of G has been written; else it is zero
  int* marked;         // [2, tiles] number of the last rectangle with a hard pair of a tile of G; null: no gradient
  float* grad;         // [gradients, n, d] output, or null
};

struct State {     // written by the prologue
  int non_finite;  // whether an embedding that takes part, a margin or a weight is not finite
  int valid[2];    // rows of each set that take part
  float margin[2];
  double weight[2];
};

struct Partial {  // one block of threads' part in the result
  double penalty[2];
  int64_t count[2];
};

struct Work {
  Embeddings set[2];  // rows, columns; the same where the rows are the columns
  bool symmetric, has_own;
  int gradients;  // 1: of the loss; 2: of the penalties. See Result
  int64_t d, row_offset;
  int width;             // d rounded up to kDepth
  int slices;            // of kSlice columns
  int parts;             // halves for each element of x^: 1, or 2 for fp32 accuracy
  Sides margin, weight;  // read by the prologue alone, into State: they may be on the device
  State* state;
  Partial* partial;  // [partials]
  int partials;
  uint32_t* undecided;  // [places of a rectangle / 32] one bit for each tile that the screen leaves
  int undecided_words;  // 0: there is no screen
  int* listed;          // [places of a rectangle] the places of those tiles
  int* listed_size;     // []
  int2* record;         // [tiles of a rectangle, 2] hard positives, hard negatives of the rows of a half of a tile
  uint4* mask;          // [tiles of a rectangle, 2, kTile] one bit for each pair: by row, by column; see `mask_bit`
  uint4* occupied;      // [tiles of a rectangle, 3] rows with a hard pair; columns with one in either half of the rows
  float* loss;          // outputs
  double* penalty;
  int64_t* count;

  const Embeddings& rows() const { return set[0]; }
  const Embeddings& columns() const { return set[1]; }
};

// A rectangle of tiles: row tiles [i0, i1), column tiles [j0, j1).
struct Rectangle {
  int i0, i1, j0, j1;
  bool diagonal;  // symmetric, and the row tiles are the column tiles: only those with i <= j
  int number;     // of the rectangle, from 1 on

  __device__ int tile(int i, int j) const { return (i - i0) * (j1 - j0) + (j - j0); }

  // Tiles in the order in which they are worked: kGroup row tiles together, column by column; and back.
  __host__ __device__ int places() const { return (i1 - i0 + kGroup - 1) / kGroup * kGroup * (j1 - j0); }
  __device__ int place(int i, int j) const {
    return (i - i0) / kGroup * kGroup * (j1 - j0) + (j - j0) * kGroup + (i - i0) % kGroup;
  }
  __device__ int row_at(int place) const { return i0 + place / kGroup / (j1 - j0) * kGroup + place % kGroup; }
  __device__ int column_at(int place) const { return j0 + place / kGroup % (j1 - j0); }
};

// Where a word of a mask keeps its column c (0..31): even columns in the low half, odd ones in the high half. Bits p
// and p + 16 are then the neighbours of one fragment of a product's operand, two halves that one multiplication makes.
__host__ __device__ constexpr int mask_bit(int c) { return c / 2 + c % 2 * 16; }
__host__ __device__ constexpr int mask_column(int bit) { return bit % 16 * 2 + bit / 16; }

// The bits of columns `first` to `last` without it, counted from the word's first: see mask_bit.
__device__ __forceinline__ uint32_t mask_range(int first, int last) {
  int a = min(max(first, 0), 32), b = max(min(max(last, 0), 32), a);
  uint32_t even = (1u << (b + 1) / 2) - (1u << (a + 1) / 2), odd = (1u << b / 2) - (1u << a / 2);
  return even | odd << 16;
}

// Rows of a tile that take part.
__device__ __forceinline__ int valid_rows(int valid, int tile) { return min(kTile, max(0, valid - tile * kTile)); }

__device__ __forceinline__ double warp_sum(double x) {
  for (int k = 16; k > 0; k /= 2) x += __shfl_xor_sync(~0u, x, k);
  return x;
}

}  // namespace tcm::cuda

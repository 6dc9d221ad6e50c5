// raster.cuh - which tile comes next.
//
// The tiles of D are swept in groups of `group` cluster rows along the columns, cluster row
// fastest: what runs at one time covers a near-square block of D, which reads least of both
// operands (8 x 256 rows; 4 cost 3%, and more, so that E stays in the L2 for fewer sweeps, gain
// nothing). Repairs restrict the rows to a list of 256-row blocks that the device made
// (GemmParams.gate); an empty list returns at once.
//
// Few tiles over a long K leave most of the device idle: the sweep then repeats for each of
// GemmParams.slices shares of K, and every share writes a result of its own (de_f32).
//
// Which cluster makes a tile: the clusters of a persistent grid take turns, so that the next
// tile's operands are under way while one is finished, and what runs at one time is at about the
// same block of K: each panel comes from memory once for all of them. Where GemmParams.early
// clusters start well before the others (dW beside dE, whose last wave leaves multiprocessors
// idle), they first make `head` of the last tiles each, then wait for the others. Turns taken at
// once gain the idle time too, but apart in K they read A twice (dE and dW at D = 4096, sustained,
// of cuBLAS's two: one after the other 1.020, turns at once 1.039, ahead and then together 1.004).
#pragma once
#include "logitless/params.cuh"
#include "logitless/types.cuh"

namespace logitless {

// The tiles of one cluster, in order.
template <bool kUneven>
struct Walk {
  int cluster, clusters, swept, early;
  int ahead;  // tiles before its first turn
  int count;

  __device__ __forceinline__ Walk(const GemmParams& p, int tiles, int cluster, int clusters)
      : cluster(cluster), clusters(clusters), early(kUneven ? p.early : 0) {
    swept = tiles - (kUneven ? p.early * p.head : 0);
    ahead = kUneven && cluster < early ? p.head : 0;
    count = ahead + (cluster < swept ? ceil_div(swept - cluster, clusters) : 0);
  }
  __device__ __forceinline__ int operator()(int i) const {
    if (kUneven && i < ahead) return swept + i * early + cluster;
    return (i - ahead) * clusters + cluster;
  }
  // Whether this is the first turn of a cluster with a head start.
  __device__ __forceinline__ bool joins(int i) const {
    return kUneven && cluster < early && i == ahead;
  }
};

struct Tile {
  int row_block;  // in units of kRows
  int column_block;
  int slice;  // of K
};

// kRows: rows of a row block, all CTAs of the cluster together. One instance a thread; all threads
// of a cluster agree.
template <int kRows, int kColumns, bool kGated, bool kSliced>
struct Raster {
  static constexpr int kPerEntry = kRows < 256 ? 256 / kRows : 1;
  static_assert(!kGated || 256 % kRows == 0, "a list entry is whole row blocks");
  int row_blocks, column_blocks, group, slices;
  const int* list;  // live row blocks, or null

  __device__ __forceinline__ Raster(const GemmParams& p, int rows)
      : row_blocks(ceil_div(rows, kRows)),
        column_blocks(ceil_div(p.n, kColumns)),
        group(p.group),
        slices(kSliced ? max(p.slices, 1) : 1),
        list(nullptr) {
    if (kGated && p.gate) {
      row_blocks = kPerEntry * __ldg(p.gate);
      list = p.gate + 1;
    }
  }
  __device__ __forceinline__ int tiles() const { return row_blocks * column_blocks * slices; }
  // Blocks of K that each slice sums; those past the end are zeros.
  __device__ __forceinline__ int share(int k_blocks) const {
    return kSliced ? ceil_div(k_blocks, slices) : k_blocks;
  }

  __device__ __forceinline__ Tile operator()(int t) const {
    const int slice = kSliced ? t / (row_blocks * column_blocks) : 0;
    if (kSliced) t -= slice * (row_blocks * column_blocks);
    const int per_group = group * column_blocks, g = t / per_group, rest = t - g * per_group;
    const int height = min(group, row_blocks - g * group), column = rest / height;
    const int row = g * group + (rest - column * height);
    return {kGated && list ? kPerEntry * __ldg(list + row / kPerEntry) + row % kPerEntry : row,
            column, slice};
  }
};

}  // namespace logitless

// params.cuh - the parameter struct of each kernel family. rust/gpu/src/params.rs mirrors this file field by field.
//
// Every struct travels by value as a __grid_constant__ parameter. 8-byte fields come first, so that neither
// compiler pads; the sizes are asserted on both sides. A null pointer means "not wanted" or "the neutral value".
#pragma once

namespace logitless {

using i64 = long long;

// -- tensor-core products: D[M, N] = epilogue(A[M, K] B[N, K]^T) ----------------------------------------------------
// sm_90a kernels take three tensor maps before it (A, B, D) and ignore a, b, d, lda, ldb, ldd; sm_80 kernels use them.
struct GemmParams {
  const void* a;        // operands as stored: K-major (M, K), or MN-major (K, M)
  const void* b;        // K-major (N, K), or MN-major (K, N)
  void* d;              // (M, N), element type by the epilogue
  i64 lda, ldb, ldd;    // pitches in elements, multiples of 16 bytes
  const int* count;     // device: live rows; replaces m, or k when count_is_k. null: the host's number
  const float* alpha;   // device: factor of a store epilogue's accumulators. null: 1
  const float* ref;     // (rows) statistics, store_exp: reference of the exponential; gradient: rest
  const int* target;    // (rows) class of the row's target, -1 for none
  const float* coef;    // (5, ld_row) gradient: planes a, b, c, d, e; store epilogues: plane 0 = row factor or null
  const float* bias;    // (classes of this launch) float copy of the bias, maps only
  float* part;          // statistics: planes of (tiles, ld_row) partials
  i64 part_plane;       // elements from one plane of partials to the next
  const int* gate;      // (row blocks of 128) repair: a tile whose blocks are all zero is skipped. null: every tile runs
  const void* onehot_w; // de: the whole weight (V, N), pitch onehot_ld, to add onehot_g[i] * W[target[i], :] in float
  const float* onehot_g;
  i64 onehot_ld;
  int m, n, k;          // extents (upper bounds where count is given)
  int ld_row;           // pitch of per-row planes (part, coef), >= m
  int col0;             // class of column 0 of this launch
  int group;            // raster: cluster rows a group
  int accumulate;       // float store: 1 adds to D
  int count_is_k;       // count replaces k, not m
  float scale;          // logit_scale
  float softcap;        // 0: none. Maps only
  float shift;          // store_exp, gradient: probabilities below 2^(shift - 126) become 0; 0: off
  int reserved;
};
static_assert(sizeof(GemmParams) == 192, "mirror rust/gpu/src/params.rs");

}  // namespace logitless

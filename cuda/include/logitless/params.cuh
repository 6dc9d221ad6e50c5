// params.cuh - the parameter struct of each kernel family. rust/gpu/src/params mirrors this file field by field.
//
// Every struct travels by value as a __grid_constant__ parameter. 8-byte fields come first, so that neither
// compiler pads; the sizes are asserted on both sides. A null pointer means "not wanted" or "the neutral value".
#pragma once

namespace logitless {

using i64 = long long;

// -- tensor-core products: D[M, N] = epilogue(A[M, K] B[N, K]^T) ----------------------------------------------------
// sm_90a kernels take three tensor maps before it (A, B, D) and ignore a, b, d, lda, ldb and, but for the pitch of
// `columns`, ldd; sm_80 kernels use them.
struct GemmParams {
  const void* a;        // operands as stored: K-major (M, K), or MN-major (K, M)
  const void* b;        // K-major (N, K), or MN-major (K, N)
  void* d;              // (M, N), element type by the epilogue
  i64 lda, ldb, ldd;    // pitches in elements, multiples of 16 bytes
  const int* count;     // device: live rows; replaces m, or k when count_is_k. null: the host's number. < 0: do nothing
  const float* alpha;   // device: factor of a store epilogue's accumulators. null: 1
  const float* ref;     // (rows) statistics, store_exp: reference of the exponential; gradient: rest
  const int* target;    // (rows) class of the row's target, -1 for none
  const float* coef;    // (5, ld_row) gradient: planes a, b, c, d, e; store epilogues: plane 0 = row factor or null
  const float* bias;    // (classes of this launch) float copy of the bias, maps only
  float* part;          // statistics: planes of (tiles, ld_row) partials
  i64 part_plane;       // elements from one plane of partials to the next
  const int* gate;      // repair, store_exp: number of 256-row blocks to run, then their indices. null: every block
  // The targets' part, added in float where it is given (epilogue/targets.cuh):
  const void* onehot_w; // de: the whole weight (V, N), dw: the input (rows, N); pitch onehot_ld
  const float* onehot_g;     // de: D[i] += onehot_g[i] * onehot_w[target[i]], for each row
  i64 onehot_ld;
  const int* onehot_start;   // dw: (m + 1) D[c] += sum of onehot_g[e] * onehot_w[onehot_rows[e]] over the entries
  const int* onehot_rows;    //     e from onehot_start[c] to onehot_start[c + 1]. null: nothing
                             // de: row i of the result goes to row onehot_rows[i] of D. null: to row i
  const float* onehot_sums;  // dw: sums of lists of 16 entries or more (pitch n): that which begins at entry b is row
                             //     b / 16. null: none was made
  const float* scale_at; // device: logit_scale; null: `scale`
  float* columns;       // gradient_sums: (m / 16, ldd) sums of D over 16 rows, or null
  float* dots;          // gradient_sums: (class blocks, ld_row) sums of D (E W^T) over a row's block, or null
  float* target_z;      // online, online_rest: (ld_row) z of each row's target, where it has one. null: not wanted
  const int* in_place;  // statistics, sm_90a: where it is not 0, A is what the map of D says. null: never
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
  int slices;           // de_f32: shares of k; each writes its own sums, `slice_rows` rows of D after the last. 0: 1
  int slice_rows;
  int early, head;      // dw: clusters with a head start, and tiles that each makes before the others join it
};
static_assert(sizeof(GemmParams) == 272, "mirror rust/gpu/src/params");

// -- shared pieces ---------------------------------------------------------------------------------------------------
// Rows of a tensor (outer, inner, features) of any strides: row i is (i / inner, i % inner).
struct RowView {
  void* data;
  i64 outer_stride, inner_stride, feature_stride;  // elements
  i64 inner;
};

// A matrix of any strides whose element type only the host knows. Codes: 0 f32, 1 f64, 2 bf16, 3 f16.
struct AnyMatrix {
  void* data;
  i64 row_stride, column_stride;  // elements
  i64 dtype;
};

// One pointer a field, in the order of the statistics' registry: outputs, saved outputs or cotangents. (N), (N, columns).
struct Fields {
  void *rest, *target, *entropy, *sum, *sum_sq, *mean, *variance, *max;
  i64* argmax;
  void *rest_power, *weighted_sum, *weighted_rest, *dot, *topk_values;
  i64* topk_ids;
};

// Which rows take part. Live rows are packed in front: rows[slot] = row, slots[row] = slot or -1. Null lists: all rows.
struct RowList {
  const int* rows;
  const int* slots;
  const int* count;
  i64 total;  // N
};

// The ids of the targets, (N, K) contiguous. An id equal to ignore is padding; a row of padding only is ignored.
struct Targets {
  const i64* ids;
  i64 ignore;
  int columns;      // K; 0: no target
  int has_ignore;
  i64 classes;      // V: an id outside [0, V) that is not padding makes the row nan
};

// -- select.cu, rows.cu, fold.cu -------------------------------------------------------------------------------------------
// live_rows: flags and the largest magnitude of the cotangents.
struct LiveParams {
  Fields grad;
  Targets targets;
  unsigned char* live;   // (N) bits: 1 it has a cotangent, 2 it is not ignored
  float* block_max;      // (blocks)
  i64 total;
  int powers, vectors, topk, is_double;
};
static_assert(sizeof(LiveParams) == 192, "mirror rust/gpu/src/params");

// What every product of a backward is scaled by: gradients of logits are divided by the largest cotangent g, so that
// half-precision tiles neither underflow nor round a uniform one; results are multiplied back. Without block_max g = 1.
struct Scalars {
  float g, inverse, g_scale, unused;     // g, 1 / g, g * logit_scale
  double g_wide, inverse_wide, g_scale_wide, unused_wide;
};
static_assert(sizeof(Scalars) == 48, "mirror rust/gpu/src/params");

// select_rows: live rows in front, in order; one block, and one more for the scalars.
struct SelectParams {
  Targets targets;
  const unsigned char* live;  // (N) live_rows' flags, or null: rows that are not ignored
  const float* block_max;     // or null
  int* rows;                  // (round_up(N, 256))
  int* slots;                 // (N)
  int* count;
  Scalars* scalars;           // of the second block
  i64 total;
  i64 blocks;                 // of block_max
  double scale;
  const void* scale_at;       // device: logit_scale, float or double; null: `scale`
  i64 is_double;
  int* in_place;              // or null: 1 where packing would save no block of 256 rows: then every row is in its place
                              // and counts, and those that are not listed have no slot; else 0
  int *kept, *again;          // or null. Where exponentials were kept of the rows that are not ignored: the count, if all
  double least;               // of them are listed because at least this share is live, else -1; and the other way round
};
static_assert(sizeof(SelectParams) == 152, "mirror rust/gpu/src/params");

// gather_rows: a packed copy of live rows, zero-filled to the pitch and to the padded row count.
struct GatherParams {
  RowView source;
  RowList list;
  void* packed;
  i64 pitch;         // elements
  int features;
  int padded;        // rows of the copy
};
static_assert(sizeof(GatherParams) == 96, "mirror rust/gpu/src/params");

// scatter_rows: from packed accumulators to the gradient of the input; dead rows become 0.
struct ScatterParams {
  RowView target;
  RowList list;
  const void* packed;   // `slices` of them, each `slice` elements after the last: their sum
  const void* factor;   // device scalar in accumulators, or null: 1
  i64 pitch;
  i64 slice;
  const void* onehot_w;      // bf16 (V, features), rows onehot_ld apart
  const float* onehot_g;     // (slots) row += onehot_g onehot_w[onehot_target], for targets below kept_classes, where
  const int* onehot_target;  // (slots) exponentials were taken: *kept >= 0. null onehot_g: nothing
  i64 onehot_ld;
  const int* kept;
  int features;
  int accumulate;
  int slices, kept_classes;
};
static_assert(sizeof(ScatterParams) == 160, "mirror rust/gpu/src/params");

// target_logits: z of the target classes, one warp a (row, column). target_classes: the classes alone, K = 1; reference 0
// where there is one, for the products make z.
struct TargetParams {
  RowView input;
  RowList list;
  Targets targets;
  AnyMatrix weight;
  AnyMatrix bias;    // data null: none
  void* out;         // (N, K)
  float* reference;  // (slots) or null: z of the target; +inf past the live rows; nan for an id out of range
  int* target;       // (padded) or null: the class, -1 for none
  double scale, softcap;
  const void* scale_at;  // device: logit_scale in accumulators; null: `scale`
  void* packed;      // null, or what gather_rows would make of the list
  i64 pitch;         // its elements a row
  const int* in_place;  // target_classes: null, or nothing is packed where it is not 0
  int* gate;         // null, or the list that finish_fixed will add to: made empty
  int features;
  int padded;        // entries of reference and target
};
static_assert(sizeof(TargetParams) == 256, "mirror rust/gpu/src/params");

// finish_online, finish_fixed, finish_full: partials of the class tiles to outputs, in a fixed order.
struct FinishParams {
  Fields out;
  RowList list;
  const float* part;
  const float* reference;  // finish_fixed: of the exponentials; else the targets' logits, if out.target is given
  i64 part_plane;
  int ld_row, tiles;
  i64 classes;
  int tile_columns;        // classes a tile, for the variance
  int planes;              // finish_online: 2 rest, 3 and entropy
  int chunk_columns;       // classes a launch: tiles restart there
  int chunk_tiles;         // tiles a launch
  int* gate;               // finish_fixed: null, or the blocks of 256 slots with a row that its reference does not reach:
                           // their number, their indices (ceil(N / 256)), and a flag for each block
};
static_assert(sizeof(FinishParams) == 216, "mirror rust/gpu/src/params");

// row_coefficients: the five planes of the gradient tile, divided by the largest cotangent.
struct CoefficientParams {
  Fields saved, grad;
  RowList list;
  Targets targets;
  const Scalars* scalars;
  float* coef;           // (5, ld_row)
  float* reference;      // (ld_row): rest
  int* target;           // (ld_row)
  i64 classes;
  int ld_row, padded;
};
static_assert(sizeof(CoefficientParams) == 352, "mirror rust/gpu/src/params");

// add_maximum: the cotangent of `max` at its class, in a gradient tile of the fused path.
struct AddMaximumParams {
  Fields saved, grad;
  RowList list;
  AnyMatrix tile;        // (slots, width)
  const Scalars* scalars;
  double softcap;
  i64 column0;
  i64 width;
};
static_assert(sizeof(AddMaximumParams) == 336, "mirror rust/gpu/src/params");

// column_sum: sums over rows of a gradient tile, times a device scalar. A row of the tile may be a sum of `group` rows.
struct ColumnSumParams {
  AnyMatrix tile;
  AnyMatrix out;         // from its entry column0 on: (columns), row_stride
  const int* count;      // or null; < 0: do nothing
  const double* factor;  // or null: 1
  const float* weights;  // (rows) or null: 1
  const int* target;     // (rows) class that counts as `value`, whatever the tile holds; or null
  const float* value;
  i64 rows;
  i64 columns;
  i64 group;
  i64 column0;           // class of column 0
};
static_assert(sizeof(ColumnSumParams) == 136, "mirror rust/gpu/src/params");

// row_dots: sum over features of packed input x packed gradient; fold_dots: their sum, one block.
struct DotParams {
  AnyMatrix input;
  AnyMatrix gradient;
  const int* count;
  double* partial;       // (rows)
  void* out;             // one float or double
  const double* factor;
  i64 rows;
  int features;
  int is_double;
};
static_assert(sizeof(DotParams) == 112, "mirror rust/gpu/src/params");

// absorb_dots: sums of each row's class blocks of a chunk, onto the rows' totals.
struct AbsorbDotParams {
  const float* part;     // (tiles, ld_row)
  const int* count;
  double* partial;       // (rows)
  i64 rows;
  int ld_row, tiles;
  int first, reserved;   // first chunk: the totals are not read
};
static_assert(sizeof(AbsorbDotParams) == 48, "mirror rust/gpu/src/params");

// widen_vector: a vector of any type and stride as accumulators.
struct WidenParams {
  AnyMatrix source;  // row_stride
  void* out;
  i64 length;
  i64 is_double;
};
static_assert(sizeof(WidenParams) == 56, "mirror rust/gpu/src/params");

// -- store.cu --------------------------------------------------------------------------------------------------------
// The stored mode keeps X = bf16(e^(z - reference)), 0 at the target, from the forward to the backward.

// finish_repair: rows of flagged blocks from online planes; a reference out of range becomes the row's rest.
struct RepairParams {
  RowList list;
  const int* gate;
  const float* part;
  float* reference;
  float* rest;           // (N), the output
  i64 part_plane;
  int ld_row, tiles;
};
static_assert(sizeof(RepairParams) == 80, "mirror rust/gpu/src/params");

// What rows of X stand for, from the cotangents.
struct FactorParams {
  RowList list;
  Targets targets;
  const float *rest, *logits, *g_rest, *g_target;  // (N): saved, logits of the targets; cotangents or null
  const float* reference;                 // (slots)
  float *factor;                          // X of slot i times this is its gradient of the logits off the target
  float *input_factor, *target_factor;    // the same times logit_scale, and g_target times logit_scale: dE
  float *ratio;                           // g_target / factor: the target as an entry of X
  const float* scale_at;
  const Scalars* scalars;                 // or null. factor and input_factor, and so the scaled rows, are divided by the
                                          // largest cotangent and lack logit_scale: the products' alpha has both
  float scale, softcap;
  int padded, reserved;                   // entries of the four
};
static_assert(sizeof(FactorParams) == 168, "mirror rust/gpu/src/params");

// The slots by the class of their target, ascending within a class, for the epilogue of dW.
struct ListTargetsParams {
  const int* target;     // (slots), -1 for none
  int* start;            // (classes + 1) where each class begins in the lists
  int* rows;             // (slots) its rows: those of the caller's input, or slots
  float* values;         // (slots) target_factor of a row, or that over the factor of its scaled row
  int classes;
  int by_slot;
};
static_assert(sizeof(ListTargetsParams) == 40, "mirror rust/gpu/src/params");

// stored_operands: what the products of a stored backward read beside X.
struct StoredOperandsParams {
  FactorParams factors;
  GatherParams scaled;     // rows of the input times `factor` and logit_scale, zero-filled like gather_rows; of that list
  ListTargetsParams lists;
  void* clear;             // (N, features), 16-byte rows: those of the caller's rows without a slot become 0. null: nothing
  int list_blocks;         // ceil((classes + 1) / 512), before those of the rows; 0: no lists
  int reserved;
};
static_assert(sizeof(StoredOperandsParams) == 320, "mirror rust/gpu/src/params");

// sum_lists: what the lists of stored_operands that are long add to their classes' rows of dW.
struct SumListsParams {
  ListTargetsParams lists;
  const i64* ids;          // (rows) of the caller's classes
  const void* source;      // bf16 rows that the lists name
  i64 pitch;               // its elements a row
  float* sums;             // (slots / 16 + 1, features): row b / 16 is that of the list which begins at entry b
  int features, reserved;
};
static_assert(sizeof(SumListsParams) == 80, "mirror rust/gpu/src/params");

// merge_rest: log(e^kept + e^rest), the whole of a row's rest from that of two sets of classes; and the entropy.
struct MergeRestParams {
  RowList list;
  const float* kept;          // (N)
  float* rest;                // (N), the output
  const float* kept_entropy;  // (N), or null
  float* entropy;             // (N), the output, or null
};
static_assert(sizeof(MergeRestParams) == 64, "mirror rust/gpu/src/params");

// stored_gradient: a tile of gradients of the logits from exponentials, in place or not.
struct StoredTileParams {
  RowList list;
  const float* coef;       // (5, ld_row): those of the gradient tile
  const float* rest;       // (slots)
  const float* reference;  // (slots): of the exponentials
  const int* target;       // (slots)
  const float* logits;     // (N), with a softcap: the targets' logits
  const void* x;           // (slots, x_pitch)
  void* tile;              // (slots, tile_pitch)
  i64 x_pitch, tile_pitch; // elements, multiples of 8
  int ld_row;
  int column0;             // class of column 0
  int width;               // classes of the tile
  float shift;             // probabilities below 2^(shift - 126) become 0
  float softcap;           // 0: none
  int moments;             // 1: the plane b too
};
static_assert(sizeof(StoredTileParams) == 128, "mirror rust/gpu/src/params");

// unpack_rows: packed rows back to their places; rows without a slot become 0.
struct UnpackParams {
  RowView target;
  RowList list;
  const void* packed;
  i64 pitch;
  int features;
  int accumulate;
};
static_assert(sizeof(UnpackParams) == 96, "mirror rust/gpu/src/params");

// frozen_rows: the gradient of the input from the sums that the frozen head's forward kept.
struct FrozenParams {
  RowView out;
  RowList list;
  Targets targets;
  const void* weight;    // bf16 (V, D), adjacent features
  i64 weight_pitch;
  const float *rest, *logits, *g_rest, *g_target;  // (N): saved, logits of the targets; cotangents or null
  const float* reference;                 // (slots)
  const float* sums;                      // (slots, pitch): of e^(z - reference) dz/dx W over the classes but the target
  i64 pitch;
  i64 slice;                              // elements from one of `slices` sums to the next
  const float* scale_at;
  float scale, softcap;
  int features;
  int accumulate;
  int slices, reserved;
};
static_assert(sizeof(FrozenParams) == 216, "mirror rust/gpu/src/params");

// -- loss.cu ---------------------------------------------------------------------------------------------------------
// Cross entropy of class ids from two statistics, and its cotangents. All in accumulators; rows contiguous.
struct LossParams {
  const void *rest, *target;  // (N)
  const i64* ids;             // (N)
  void* loss;                 // (N) or one
  void* share;                // one: what the reduction multiplies a row by; not read or written per row
  const void* gradient;       // (N) or one
  void *g_rest, *g_target;    // (N)
  double z_loss;
  i64 ignore;                 // rows of this id count for nothing
  i64 rows;
  int per_row;                // no reduction
  int mean;                   // else sum
};
static_assert(sizeof(LossParams) == 96, "mirror rust/gpu/src/params");

// Log-probability and entropy from three statistics, and their cotangents. All in accumulators; rows contiguous.
struct PolicyParams {
  const void *rest, *target, *rest_entropy;  // (N)
  const i64* ids;                            // (N)
  void *log_prob, *entropy;                  // (N)
  const void *g_log_prob, *g_entropy;        // (N) or null
  void *g_rest, *g_target, *g_rest_entropy;  // (N); the last may be null
  i64 ignore;                                // rows of this id have 0 of everything
  i64 rows;
};
static_assert(sizeof(PolicyParams) == 104, "mirror rust/gpu/src/params");

// -- tile.cu ---------------------------------------------------------------------------------------------------------
// A tile of z (live rows, width) in accumulators: folded into each row's state, or turned into a tile of dz.
struct TileParams {
  Fields saved, grad;    // statistics: saved = outputs
  RowList list;
  Targets targets;
  const void* z;         // (slots, z_pitch)
  void* dx;              // (padded, dx_pitch): gradient in the type of the products
  i64 z_pitch, dx_pitch;
  void* state;           // (slots, state_size) accumulators
  const void* vectors;   // (C, V), or null
  i64 vector_stride, vector_column;
  AnyMatrix dense;       // (N, V) q, data null: none
  AnyMatrix d_dense;     // its gradient
  const Scalars* scalars;
  double softcap;
  const void* bias;      // with dots: (width) accumulators, or null
  const void* scale_at;  // with dots: device: logit_scale; null: `scale`
  double scale;
  double* dots;          // (slots) sums of dz/dx times the product, or null: z then holds products, not logits
  i64 column0;           // class of column 0
  int width, state_size;
  int first, last;       // first and last tile of the classes
  int mask;              // statistics wanted, bit = kRest ...
  int powers, vector_count, topk;
  double power[8];
  int padded;            // rows of dx to fill with zeros past the live ones
  int keep;              // gradient: also left in z, in accumulators
};
static_assert(sizeof(TileParams) == 592, "mirror rust/gpu/src/params");

// Bits of TileParams::mask.
enum Statistic {
  kRest = 1, kEntropy = 2, kSum = 4, kSumSq = 8, kVariance = 16, kMax = 32, kRestPower = 64,
  kWeightedSum = 128, kWeightedRest = 256, kDot = 512, kTopk = 1024, kTarget = 2048
};

// -- gemm_plain.cu ---------------------------------------------------------------------------------------------------
// D[M, N] = A[M, K] B[N, K]^T for any strides, without tensor cores.
struct PlainParams {
  const void *a, *b;
  void* d;
  i64 a_m, a_k, b_n, b_k, d_m, d_n;  // strides in elements
  const int* count;     // replaces m, or k
  const void* alpha;    // device scalar in accumulators, or null
  const void* bias;     // (N) accumulators, or null; logits only
  const void* scale_at; // device: logit_scale in accumulators; null: `scale`
  double scale, softcap;
  int m, n, k;
  int count_is_k, accumulate, logits;
};
static_assert(sizeof(PlainParams) == 144, "mirror rust/gpu/src/params");

}  // namespace logitless

// select.cu - which rows take part: those that are not ignored, or those that carry a cotangent;
// and what a backward is scaled by.
//
// The list is made on the device and read by every later launch through its count: nothing is ever
// read back by the host. One thread a row, then one block of 1024 with 8 rows a thread in flight:
// 48 registers, less than 1 KB of shared memory, no spills; 4 us for 8192 rows.
#include "logitless/common.cuh"

using namespace logitless;

namespace {

// Bits of a row's flag: it has a cotangent; it is not ignored.
constexpr int kLive = 1, kTakesPart = 2;

// An ignored row has targets, all of them padding.
__device__ __forceinline__ bool is_ignored(const Targets& t, i64 row) {
  if (t.columns == 0 || !t.has_ignore) return false;
  for (int k = 0; k < t.columns; k++)
    if (t.ids[row * t.columns + k] != t.ignore) return false;
  return true;
}

template <class T>
__device__ float largest(const void* field, i64 row, int columns, float most) {
  if (!field) return most;
  for (int c = 0; c < columns; c++) {
    const float x = fabsf((float)((const T*)field)[row * columns + c]);
    most = x > most || is_nan(x) ? x : most;
  }
  return most;
}
template <class T>
__device__ float largest_cotangent(const LiveParams& p, i64 row) {
  const Fields& g = p.grad;
  float most = 0.f;
  for (const void* field :
       {(const void*)g.rest, (const void*)g.entropy, (const void*)g.sum, (const void*)g.sum_sq,
        (const void*)g.mean, (const void*)g.variance, (const void*)g.max, (const void*)g.dot})
    most = largest<T>(field, row, 1, most);
  most = largest<T>(g.target, row, p.targets.columns, most);
  most = largest<T>(g.rest_power, row, p.powers, most);
  most = largest<T>(g.weighted_sum, row, p.vectors, most);
  most = largest<T>(g.weighted_rest, row, p.vectors, most);
  return largest<T>(g.topk_values, row, p.topk, most);
}

// Largest of a block of 256; every thread gets it.
__device__ float block_largest(float x) {
  __shared__ float shared[8];
  x = warp_max(x);
  if ((threadIdx.x & 31) == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  return warp_max(shared[threadIdx.x & 7]);
}

}  // namespace

// One thread a row: a row is live when it is not ignored and carries a cotangent (nan counts).
KERNEL(live_rows, LiveParams, 256) {
  const i64 row = blockIdx.x * 256ll + threadIdx.x;
  float most = 0.f;
  if (row < p.total) {
    const bool part = !is_ignored(p.targets, row);
    if (part)
      most = p.is_double ? largest_cotangent<double>(p, row) : largest_cotangent<float>(p, row);
    p.live[row] = (part ? kTakesPart : 0) | (most == 0.f ? 0 : kLive);
  }
  most = block_largest(most);
  if (threadIdx.x == 0) p.block_max[blockIdx.x] = most;
}

namespace {

constexpr int kRounds = 8, kPass = 1024 * kRounds;

// A thread's first row of a pass: each warp takes 256 rows that follow one another.
__device__ __forceinline__ i64 first_row(i64 pass) {
  return pass + threadIdx.x / 32 * (32 * kRounds) + (threadIdx.x & 31);
}

// Which of a thread's rows of a pass take part; bit i: row `first` + 32 i. All loads fly at once.
__device__ __forceinline__ u32 flagged(const unsigned char* flags, int mask, i64 first, i64 total) {
  const int left = (int)min(total - first, (i64)kPass);
  unsigned char flag[kRounds];
  u32 bits = 0;
#pragma unroll
  for (int i = 0; i < kRounds; i++) flag[i] = 32 * i < left ? flags[first + 32 * i] : 0;
#pragma unroll
  for (int i = 0; i < kRounds; i++) bits |= (flag[i] & mask ? 1u : 0u) << i;
  return bits;
}
__device__ __forceinline__ u32 not_ignored(const Targets& t, i64 first, i64 total) {
  const int left = (int)min(total - first, (i64)kPass);
  u32 bits = 0;
  if (t.columns == 1) {
    i64 id[kRounds];
#pragma unroll
    for (int i = 0; i < kRounds; i++) id[i] = 32 * i < left ? t.ids[first + 32 * i] : t.ignore;
#pragma unroll
    for (int i = 0; i < kRounds; i++) bits |= (id[i] != t.ignore ? 1u : 0u) << i;
    return bits;
  }
#pragma unroll 1
  for (int i = 0; 32 * i < left && i < kRounds; i++)
    bits |= (is_ignored(t, first + 32 * i) ? 0u : 1u) << i;
  return bits;
}

// Sum of a block of 1024, to every thread; once for each `shared`.
__device__ __forceinline__ int block_sum(int x, int (&shared)[32]) {
  x = warp_sum(x);
  if ((threadIdx.x & 31) == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();  // every warp's sum
  return warp_sum(shared[threadIdx.x & 31]);
}

// Whether enough rows are live that all that were kept are taken again, the others with
// coefficients of 0. One block.
__device__ __forceinline__ bool takes_all(const SelectParams& p) {
  __shared__ int totals[2][32];
  int live = 0, kept = 0;
#pragma unroll 1
  for (i64 pass = 0; pass < p.total; pass += kPass) {
    live += __popc(flagged(p.live, kLive, first_row(pass), p.total));
    kept += __popc(flagged(p.live, kTakesPart, first_row(pass), p.total));
  }
  live = block_sum(live, totals[0]);
  return live >= p.least * block_sum(kept, totals[1]);
}

// Whether the rows that are not ignored fill as many blocks of 256 as all rows. One block.
__device__ __forceinline__ bool stay_in_place(const SelectParams& p) {
  __shared__ int totals[32];
  int listed = 0;
#pragma unroll 1
  for (i64 pass = 0; pass < p.total; pass += kPass)
    listed += __popc(not_ignored(p.targets, first_row(pass), p.total));
  return (block_sum(listed, totals) + 255) / 256 == (p.total + 255) / 256;
}

// One warp: what the products of a backward are scaled by.
__device__ void make_scalars(const SelectParams& p) {
  const int lane = threadIdx.x;
  if (lane >= 32) return;
  const double scale = !p.scale_at   ? p.scale
                       : p.is_double ? *(const double*)p.scale_at
                                     : *(const float*)p.scale_at;
  float most = 0.f;
  in_batches<4>(
      lane, 32, (int)p.blocks, [&](int i) { return p.block_max[i]; },
      [&](int, float x) { most = x > most || is_nan(x) ? x : most; });
  most = warp_max(most);
  // Nothing to normalise by: no cotangent at all, or one that is inf or nan and must stay so.
  if (!(most > 0.f) || most == infinity()) most = 1.f;
  const double g = most;
  if (lane == 0) *p.scalars = {most, 1.f / most, (float)(g * scale), 0.f, g, 1. / g, g * scale, 0.};
}

}  // namespace

// One block of 1024, 8192 rows a pass: a warp counts its 256, reads what the others counted, and
// writes. A second block, where it is launched, makes the scalars.
KERNEL(select_rows, SelectParams, 1024, 1) {
  if (blockIdx.x == 1) return make_scalars(p);
  __shared__ int counts[2][32];  // of this pass and of the one before, which a warp may still read
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const bool all_kept = p.kept && takes_all(p), in_place = p.in_place && stay_in_place(p);
  int base = 0, turn = 0;
#pragma unroll 1
  for (i64 pass = 0; pass < p.total; pass += kPass, turn ^= 1) {
    const i64 first = first_row(pass);
    const u32 live = p.live ? flagged(p.live, all_kept ? kTakesPart : kLive, first, p.total)
                            : not_ignored(p.targets, first, p.total);
    u32 votes[kRounds];
    int mine = 0;
#pragma unroll
    for (int i = 0; i < kRounds; i++) {
      votes[i] = __ballot_sync(kFullWarp, live >> i & 1);
      mine += __popc(votes[i]);
    }
    if (lane == 0) counts[turn][warp] = mine;
    __syncthreads();  // every count is there; and the pass before last's have been read
    int through = counts[turn][lane];
#pragma unroll
    for (int o = 1; o < 32; o *= 2) {
      const int other = __shfl_up_sync(kFullWarp, through, o);
      through += lane >= o ? other : 0;
    }
    int slot = base + __shfl_sync(kFullWarp, through, warp) - mine;
    base += __shfl_sync(kFullWarp, through, 31);
#pragma unroll
    for (int i = 0; i < kRounds; i++) {
      const i64 row = first + 32 * i;
      const int at = in_place ? (int)row : slot + __popc(votes[i] & ((1u << lane) - 1));
      const bool listed = live >> i & 1;
      if (row < p.total) p.slots[row] = listed ? at : -1;
      if (listed || (in_place && row < p.total)) p.rows[at] = (int)row;
      slot += __popc(votes[i]);
    }
  }
  if (in_place) base = (int)p.total;
  // Who asks for a row before the count is known finds one.
#pragma unroll 1
  for (i64 i = base + threadIdx.x; i < (p.total + 255) / 256 * 256; i += 1024) p.rows[i] = 0;
  if (threadIdx.x) return;
  *p.count = base;
  if (p.in_place) *p.in_place = in_place;
  if (p.kept) {
    *p.kept = all_kept ? base : -1;
    *p.again = all_kept ? -1 : base;
  }
}

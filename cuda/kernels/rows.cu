// rows.cu - the memory-bound kernels around the products: which rows take part, packing, target logits, folding, scattering.
//
// Every sum runs in a fixed order. A row list is made on the device and read by every later launch through its count, so
// nothing here is ever read back by the host. Grids are sized for all N rows; blocks past the live count leave at once.
#include "logitless/common.cuh"
#include "logitless/statistics/partial.cuh"

using namespace logitless;

namespace {




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
  for (const void* field : {(const void*)g.rest, (const void*)g.entropy, (const void*)g.sum, (const void*)g.sum_sq, (const void*)g.mean,
                            (const void*)g.variance, (const void*)g.max, (const void*)g.dot})
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
extern "C" __global__ void __launch_bounds__(256) live_rows(const __grid_constant__ LiveParams p) {
  const i64 row = blockIdx.x * 256ll + threadIdx.x;
  float most = 0.f;
  if (row < p.total) {
    if (!is_ignored(p.targets, row)) most = p.is_double ? largest_cotangent<double>(p, row) : largest_cotangent<float>(p, row);
    p.live[row] = !(most == 0.f);
  }
  most = block_largest(most);
  if (threadIdx.x == 0) p.block_max[blockIdx.x] = most;
}

// Whether enough rows are live that all that were kept are taken again, the others with coefficients of 0. One block.
__device__ bool takes_all(const SelectParams& p) {
  __shared__ int total[2][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  int live = 0, kept = 0;
#pragma unroll 8
  for (i64 row = threadIdx.x; row < p.total; row += 1024) {
    live += p.live[row] != 0;
    kept += !is_ignored(p.targets, row);
  }
  live = warp_sum(live);
  kept = warp_sum(kept);
  if (lane == 0) {
    total[0][warp] = live;
    total[1][warp] = kept;
  }
  __syncthreads();  // every warp's counts
  return warp_sum(total[0][lane]) >= p.least * warp_sum(total[1][lane]);
}

// One block of 1024: an exclusive scan of the flags, 8192 rows at a time. Eight loads fly at once: one at a time, the block
// waits for memory and for itself after every 1024 rows.
extern "C" __global__ void __launch_bounds__(1024) select_rows(const __grid_constant__ SelectParams p) {
  constexpr int kRounds = 8, kWarps = 32;
  __shared__ int before[kRounds * kWarps];  // live rows of the pass before this round and warp
  __shared__ int all;
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const bool all_kept = p.kept && takes_all(p);
  int base = 0;
  for (i64 first = 0; p.rows && first < p.total; first += 1024 * kRounds) {
    bool live[kRounds];
    u32 votes[kRounds];
#pragma unroll
    for (int i = 0; i < kRounds; i++) {
      const i64 row = first + 1024 * i + threadIdx.x;
      live[i] = row < p.total && (p.live && !all_kept ? p.live[row] != 0 : !is_ignored(p.targets, row));
    }
#pragma unroll
    for (int i = 0; i < kRounds; i++) {
      votes[i] = __ballot_sync(kFullWarp, live[i]);
      if (lane == 0) before[kWarps * i + warp] = __popc(votes[i]);
    }
    __syncthreads();  // every count is there
    if (warp == 0) {
      int mine[kRounds], sum = 0;
#pragma unroll
      for (int i = 0; i < kRounds; i++) {
        mine[i] = sum;
        sum += before[kRounds * lane + i];
      }
      int through = sum;
#pragma unroll
      for (int o = 1; o < 32; o *= 2) {
        const int other = __shfl_up_sync(kFullWarp, through, o);
        through += lane >= o ? other : 0;
      }
#pragma unroll
      for (int i = 0; i < kRounds; i++) before[kRounds * lane + i] = through - sum + mine[i];
      if (lane == 31) all = through;
    }
    __syncthreads();  // every sum is there
#pragma unroll
    for (int i = 0; i < kRounds; i++) {
      const i64 row = first + 1024 * i + threadIdx.x;
      const int slot = base + before[kWarps * i + warp] + __popc(votes[i] & ((1u << lane) - 1));
      if (row < p.total) p.slots[row] = live[i] ? slot : -1;
      if (live[i]) p.rows[slot] = (int)row;
    }
    base += all;
    __syncthreads();  // the next pass writes both again
  }
  if (p.count && threadIdx.x == 0) *p.count = p.rows ? base : (int)p.total;
  if (p.kept && threadIdx.x == 0) {
    *p.kept = all_kept ? base : -1;
    *p.again = all_kept ? -1 : base;
  }
  if (p.scalars && warp == 0) {
    float most = 0.f;
    for (i64 i = lane; i < p.blocks; i += 32) {
      const float x = p.block_max[i];
      most = x > most || is_nan(x) ? x : most;
    }
    most = warp_max(most);
    // Nothing to normalise by: no cotangent at all, or one that is inf or nan and must stay so.
    if (!(most > 0.f) || most == infinity()) most = 1.f;
    if (lane == 0) {
      const double g = most;
      const double scale = !p.scale_at ? p.scale : p.is_double ? *(const double*)p.scale_at : *(const float*)p.scale_at;
      *p.scalars = {most, 1.f / most, (float)(g * scale), 0.f, g, 1. / g, g * scale, 0.};
    }
  }
}

// -- packing ----------------------------------------------------------------------------------------------------------
namespace {

// A warp copies a row; zeros to the pitch.
template <class T>
__device__ __forceinline__ void copy_row(T* out, const T* in, i64 stride, int features, i64 pitch, int lane) {
  constexpr int kPack = 16 / sizeof(T);
  int d = lane;
  if (stride == 1 && is_aligned(in) && is_aligned(out)) {
    const int whole = features / kPack;
#pragma unroll 4
    for (int i = lane; i < whole; i += 32) ((uint4*)out)[i] = __ldg((const uint4*)in + i);
    d += whole * kPack;
  }
  for (; d < pitch; d += 32) out[d] = d < features ? in[d * stride] : T{};
}

// One warp a packed row. T is an unsigned integer of the element's size: nothing is computed.
template <class T>
__device__ __forceinline__ void gather(const GatherParams& p) {
  const int slot = (int)row_of_warp(), lane = threadIdx.x & 31, count = live_count(p.list);
  if (slot >= zeroed_rows(count, p.padded)) return;
  const bool live = slot < count;
  const T* in = live ? row_of<T>(p.source, row_at(p.list, slot)) : nullptr;
  copy_row((T*)p.packed + slot * p.pitch, in, p.source.feature_stride, live ? p.features : 0, p.pitch, lane);
}

// One warp a row of the target; one block where slices are summed, for there are few rows then. From packed accumulators
// (slots), or the slices of a sum, to rows; a row without a slot becomes 0.
template <class Acc, class T>
__device__ __forceinline__ void scatter(const ScatterParams& p) {
  const bool sliced = p.slices > 1;
  const i64 row = sliced ? blockIdx.x : row_of_warp();
  if (row >= p.list.total) return;
  const int slot = p.list.slots ? p.list.slots[row] : (int)row;
  const int first = sliced ? threadIdx.x : threadIdx.x & 31, step = sliced ? 256 : 32;
  T* out = const_cast<T*>(row_of<T>(p.target, row));
  const Acc factor = p.factor ? *(const Acc*)p.factor : (Acc)1;
  const Acc* in = (const Acc*)p.packed + slot * p.pitch;
  auto sum = [&](Acc x, T old) {
    x *= factor;
    return Element<T>::from(p.accumulate ? widen(old) + x : x);
  };
  int d = first;
  if (p.target.feature_stride == 1 && is_aligned(out) && slot >= 0) {
    const int whole = p.features / 8;
#pragma unroll 2
    for (int i = first; i < whole; i += step) {
      Pack<Acc> x = ((const Pack<Acc>*)in)[i];
      for (int s = 1; s < p.slices; s++) {
        const Pack<Acc> more = ((const Pack<Acc>*)(in + s * p.slice))[i];
#pragma unroll
        for (int j = 0; j < 8; j++) x.x[j] += more.x[j];
      }
      Pack<T> y = {};
      if (p.accumulate) y = ((const Pack<T>*)out)[i];
#pragma unroll
      for (int j = 0; j < 8; j++) y.x[j] = sum(x.x[j], y.x[j]);
      ((Pack<T>*)out)[i] = y;
    }
    d += whole * 8;
  }
  for (; d < p.features; d += step) {
    Acc x = slot < 0 ? (Acc)0 : in[d];
    for (int s = 1; s < p.slices && slot >= 0; s++) x += in[s * p.slice + d];
    T* at = out + d * p.target.feature_stride;
    *at = sum(x, p.accumulate ? *at : T{});
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256) gather_rows_2(const __grid_constant__ GatherParams p) { gather<u16>(p); }
extern "C" __global__ void __launch_bounds__(256) gather_rows_4(const __grid_constant__ GatherParams p) { gather<u32>(p); }
extern "C" __global__ void __launch_bounds__(256) gather_rows_8(const __grid_constant__ GatherParams p) { gather<u64>(p); }

extern "C" __global__ void __launch_bounds__(256) scatter_rows_f32_bf16(const __grid_constant__ ScatterParams p) { scatter<float, bf16>(p); }
extern "C" __global__ void __launch_bounds__(256) scatter_rows_f32_f16(const __grid_constant__ ScatterParams p) { scatter<float, f16>(p); }
extern "C" __global__ void __launch_bounds__(256) scatter_rows_f32_f32(const __grid_constant__ ScatterParams p) { scatter<float, float>(p); }
extern "C" __global__ void __launch_bounds__(256) scatter_rows_f64_f64(const __grid_constant__ ScatterParams p) { scatter<double, double>(p); }

// -- target logits ----------------------------------------------------------------------------------------------------
namespace {

// One warp a (slot, column). Slots past the live rows fill the neutral reference. Where the products want live rows packed,
// they are copied on the way.
template <class T>
__device__ __forceinline__ void target_logits(const TargetParams& p) {
  using Acc = typename Element<T>::Acc;
  const int columns = p.targets.columns, lane = threadIdx.x & 31;
  const i64 job = blockIdx.x * 8ll + threadIdx.x / 32;
  const i64 slot = job / columns;
  const int k = job - slot * columns, count = live_count(p.list);
  if (p.packed && k == 0 && slot < zeroed_rows(count, p.padded)) {
    const bool live = slot < count;
    const T* in = live ? row_of<T>(p.input, row_at(p.list, (int)slot)) : nullptr;
    copy_row((T*)p.packed + slot * p.pitch, in, p.input.feature_stride, live ? p.features : 0, p.pitch, lane);
  }
  if (slot >= count) {
    if (lane == 0 && k == 0 && slot < p.padded) {
      if (p.reference) p.reference[slot] = infinity();
      if (p.target) p.target[slot] = -1;
    }
    return;
  }
  const i64 row = row_at(p.list, slot), id = p.targets.ids[row * columns + k];
  const bool padding = p.targets.has_ignore && id == p.targets.ignore;
  Acc z = (Acc)0;
  if (!padding && (id < 0 || id >= p.targets.classes)) {
    z = not_a_number<Acc>();
  } else if (!padding) {
    const T* e = row_of<T>(p.input, row);
    const T* w = (const T*)p.weight.data + id * p.weight.row_stride;
    const i64 es = p.input.feature_stride, ws = p.weight.column_stride;
    constexpr int kPack = 16 / sizeof(T);
    int d = lane;
    if (es == 1 && ws == 1 && (u64)e % 16 == 0 && (u64)w % 16 == 0) {
      for (int i = lane; i < p.features / kPack; i += 32) {
        const uint4 a = __ldg((const uint4*)e + i), b = __ldg((const uint4*)w + i);
        const T* x = (const T*)&a;
        const T* y = (const T*)&b;
#pragma unroll
        for (int j = 0; j < kPack; j++) z += widen(x[j]) * widen(y[j]);
      }
      d += p.features / kPack * kPack;
    }
    for (; d < p.features; d += 32) z += widen(e[d * es]) * widen(w[d * ws]);
    const Acc bias = p.bias.data ? load_any<Acc>(p.bias.data, (int)p.bias.dtype, id * p.bias.row_stride) : (Acc)0;
    const Acc scale = p.scale_at ? *(const Acc*)p.scale_at : (Acc)p.scale;
    z = logit_map(warp_sum(z), scale, bias, (Acc)p.softcap);
  }
  if (lane == 0) {
    ((Acc*)p.out)[row * columns + k] = z;
    if (p.reference) p.reference[slot] = (float)z;
    if (p.target) p.target[slot] = padding || id < 0 || id >= p.targets.classes ? -1 : (int)id;
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256) target_logits_bf16(const __grid_constant__ TargetParams p) { target_logits<bf16>(p); }
extern "C" __global__ void __launch_bounds__(256) target_logits_f16(const __grid_constant__ TargetParams p) { target_logits<f16>(p); }
extern "C" __global__ void __launch_bounds__(256) target_logits_f32(const __grid_constant__ TargetParams p) { target_logits<float>(p); }
extern "C" __global__ void __launch_bounds__(256) target_logits_f64(const __grid_constant__ TargetParams p) { target_logits<double>(p); }

// -- partials to outputs ----------------------------------------------------------------------------------------------
namespace {

// Block = 32 rows x kSlices slices of the tiles. A slice is folded in order, then the slices of a row in order. Four tiles
// are loaded before the first is merged: the merges are short chains and would wait for memory one by one.
template <class Partial, int kSlices>
__device__ __forceinline__ void finish(const FinishParams& p) {
  __shared__ __align__(16) unsigned char bytes[kSlices * 32 * sizeof(Partial)];
  Partial* shared = (Partial*)bytes;
  const int lane = threadIdx.x & 31, slice = threadIdx.x / 32;
  const i64 row = blockIdx.x * 32ll + lane;
  const int slot = row >= p.list.total ? -1 : p.list.slots ? p.list.slots[row] : (int)row;
  Partial state = Partial::empty();
  if (slot >= 0) {
    auto load = [&](int tile) {
      // Columns of this tile: the last one of a launch, and of all launches, is ragged.
      const int chunk = tile / p.chunk_tiles, in_chunk = (tile - chunk * p.chunk_tiles) * p.tile_columns;
      const i64 chunk_end = min((i64)p.chunk_columns, p.classes - (i64)chunk * p.chunk_columns);
      return Partial::load(p, p.part + (i64)tile * p.ld_row + slot, (int)min((i64)p.tile_columns, chunk_end - in_chunk));
    };
    const int per = (p.tiles + kSlices - 1) / kSlices, end = min(p.tiles, (slice + 1) * per);
    int tile = slice * per;
    for (; tile + 4 <= end; tile += 4) {
      const Partial next[4] = {load(tile), load(tile + 1), load(tile + 2), load(tile + 3)};
#pragma unroll
      for (int i = 0; i < 4; i++) state.merge(next[i]);
    }
    for (; tile < end; tile++) state.merge(load(tile));
  }
  shared[threadIdx.x] = state;
  __syncthreads();
  if (slice != 0 || row >= p.list.total) return;
  for (int i = 1; i < kSlices; i++) state.merge(shared[32 * i + lane]);
  state.finish(p, row, slot);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(512) finish_online(const __grid_constant__ FinishParams p) { finish<OnlinePartial, 16>(p); }
extern "C" __global__ void __launch_bounds__(512) finish_fixed(const __grid_constant__ FinishParams p) { finish<FixedPartial, 16>(p); }
extern "C" __global__ void __launch_bounds__(512) finish_fixed_moment(const __grid_constant__ FinishParams p) { finish<FixedMomentPartial, 16>(p); }
extern "C" __global__ void __launch_bounds__(256) finish_full(const __grid_constant__ FinishParams p) { finish<FullPartial, 8>(p); }

// -- coefficients of the gradient tile --------------------------------------------------------------------------------
// dz = r (a + b t) + c + d z off the target, with t = z - rest and r = exp(t); at the target c + d z + e.
// rest_entropy = rest - mean over r, so a = g_rest - g_entropy rest_entropy keeps its digits.
extern "C" __global__ void __launch_bounds__(256) row_coefficients(const __grid_constant__ CoefficientParams p) {
  const int slot = blockIdx.x * 256 + threadIdx.x;
  if (slot >= p.padded) return;
  float a = 0.f, b = 0.f, c = 0.f, d = 0.f, e = 0.f, rest = infinity();
  int target = -1;
  if (slot < live_count(p.list)) {
    const i64 row = row_at(p.list, slot);
    const float norm = p.scalars->inverse;
    auto get = [&](const void* field) { return field ? ((const float*)field)[row] : 0.f; };
    auto grad = [&](const void* field) { return norm * get(field); };
    const float g_entropy = grad(p.grad.entropy), g_variance = 2.f / (float)p.classes * grad(p.grad.variance);
    rest = get(p.saved.rest);
    a = grad(p.grad.rest);
    if (g_entropy != 0.f) {
      a -= g_entropy * get(p.saved.entropy);
      b = -g_entropy;
    }
    c = grad(p.grad.sum) + grad(p.grad.mean) / (float)p.classes;
    if (g_variance != 0.f) c -= g_variance * get(p.saved.mean);
    d = 2.f * grad(p.grad.sum_sq) + g_variance;
    if (p.targets.columns == 1) {
      const i64 id = p.targets.ids[row];
      const bool padding = p.targets.has_ignore && id == p.targets.ignore;
      if (!padding && id >= 0 && id < p.targets.classes) {
        target = (int)id;
        e = grad(p.grad.target);
      } else if (!padding) {
        a = not_a_number<float>();  // an id out of range: the row's gradient is nan, like its loss
      }
    }
    // No class but the target: the sum is empty, and every r is 0.
    if (rest == -infinity()) rest = infinity();
  }
  p.coef[slot] = a;
  p.coef[p.ld_row + slot] = b;
  p.coef[2 * (i64)p.ld_row + slot] = c;
  p.coef[3 * (i64)p.ld_row + slot] = d;
  p.coef[4 * (i64)p.ld_row + slot] = e;
  p.reference[slot] = rest;
  p.target[slot] = target;
}

// One thread a slot: the maximum's class lies in one tile of each row.
extern "C" __global__ void __launch_bounds__(256) add_maximum(const __grid_constant__ AddMaximumParams p) {
  const int slot = blockIdx.x * 256 + threadIdx.x;
  if (slot >= live_count(p.list)) return;
  const i64 row = row_at(p.list, slot), column = p.saved.argmax[row] - p.column0;
  if (column < 0 || column >= p.width) return;
  const float z = ((const float*)p.saved.max)[row], ratio = p.softcap > 0. ? z / (float)p.softcap : 0.f;
  const float g = p.scalars->inverse * ((const float*)p.grad.max)[row] * (1.f - ratio * ratio);
  const i64 at = slot * p.tile.row_stride + column;
  store_any<float>(p.tile.data, (int)p.tile.dtype, at, load_any<float>(p.tile.data, (int)p.tile.dtype, at) + g);
}

// -- small sums -------------------------------------------------------------------------------------------------------
// Block = 32 columns x 8 slices of the rows.
extern "C" __global__ void __launch_bounds__(256) column_sum(const __grid_constant__ ColumnSumParams p) {
  __shared__ double shared[8][32];
  const int lane = threadIdx.x & 31, slice = threadIdx.x / 32;
  const i64 column = blockIdx.x * 32ll + lane, live = p.count ? *p.count : p.rows, rows = (live + p.group - 1) / p.group;
  if (live < 0) return;
  double total = 0.;
  if (column < p.columns) {
    // Short float runs keep the order and the speed; their totals are folded in double.
    for (i64 first = slice; first < rows; first += 8 * 64) {
      float run = 0.f;
      double wide = 0.;
      for (i64 row = first; row < min(rows, first + 8 * 64); row += 8) {
        const i64 at = row * p.tile.row_stride + column * p.tile.column_stride;
        if (p.tile.dtype == 1) {
          wide += ((const double*)p.tile.data)[at];
        } else {
          const bool target = p.target && p.target[row] == column;
          const float x = target ? p.value[row] : load_any<float>(p.tile.data, (int)p.tile.dtype, at);
          run += x * (p.weights ? p.weights[row] : 1.f);
        }
      }
      total += run + wide;
    }
  }
  shared[slice][lane] = total;
  __syncthreads();
  if (slice != 0 || column >= p.columns) return;
  for (int i = 1; i < 8; i++) total += shared[i][lane];
  store_any<double>(p.out.data, (int)p.out.dtype, column * p.out.row_stride, total * (p.factor ? *p.factor : 1.));
}

// One warp a row.
extern "C" __global__ void __launch_bounds__(256) row_dots(const __grid_constant__ DotParams p) {
  const i64 row = blockIdx.x * 8ll + threadIdx.x / 32;
  const int lane = threadIdx.x & 31;
  if (row >= p.rows) return;
  double total = 0.;
  if (row < (p.count ? *p.count : p.rows))
    for (int d = lane; d < p.features; d += 32)
      total += load_any<double>(p.input.data, (int)p.input.dtype, row * p.input.row_stride + d * p.input.column_stride) *
               load_any<double>(p.gradient.data, (int)p.gradient.dtype, row * p.gradient.row_stride + d * p.gradient.column_stride);
  total = warp_sum(total);
  if (lane == 0) p.partial[row] = total;
}

// One thread a row.
extern "C" __global__ void __launch_bounds__(256) absorb_dots(const __grid_constant__ AbsorbDotParams p) {
  const i64 row = blockIdx.x * 256ll + threadIdx.x;
  if (row >= p.rows) return;
  double total = p.first ? 0. : p.partial[row];
  if (row < (p.count ? *p.count : p.rows))
    for (int tile = 0; tile < p.tiles; tile++) total += __ldg(p.part + (i64)tile * p.ld_row + row);
  p.partial[row] = total;
}

// One block of 256.
extern "C" __global__ void __launch_bounds__(256) fold_dots(const __grid_constant__ DotParams p) {
  __shared__ double shared[8];
  double total = 0.;
  for (i64 row = threadIdx.x; row < p.rows; row += 256) total += p.partial[row];
  total = warp_sum(total);
  if ((threadIdx.x & 31) == 0) shared[threadIdx.x / 32] = total;
  __syncthreads();
  if (threadIdx.x) return;
  for (int i = 1; i < 8; i++) total += shared[i];
  if (p.factor) total *= *p.factor;
  if (p.is_double) *(double*)p.out = total;
  else *(float*)p.out = (float)total;
}

extern "C" __global__ void __launch_bounds__(256) widen_vector(const __grid_constant__ WidenParams p) {
  const i64 i = blockIdx.x * 256ll + threadIdx.x;
  if (i >= p.length) return;
  if (p.is_double) ((double*)p.out)[i] = load_any<double>(p.source.data, (int)p.source.dtype, i * p.source.row_stride);
  else ((float*)p.out)[i] = load_any<float>(p.source.data, (int)p.source.dtype, i * p.source.row_stride);
}

// rows.cu - the memory-bound kernels before and after the products: packing, target logits,
// coefficients of the gradient tile, scattering.
//
// Grids are sized for all N rows; blocks past the live count leave at once. Blocks of 256 threads,
// a row a warp, whose loads are asked for in batches (in_batches, common.cuh): 32 to 70 registers,
// at least 3 blocks a multiprocessor, and 60 to 130 KB on the way to it. No shared memory, no
// spills.
#include "logitless/common.cuh"

using namespace logitless;

// -- packing ------------------------------------------------------------------------------------
namespace {

// A warp copies a row; zeros to the pitch.
template <class T>
__device__ __forceinline__ void copy_row(T* out, const T* in, i64 stride, int features, i64 pitch,
                                         int lane) {
  constexpr int kPack = 16 / sizeof(T);
  int d = lane;
  if (stride == 1 && is_aligned(in) && is_aligned(out)) {
    const int whole = features / kPack;
    in_batches<4>(
        lane, 32, whole, [&](int i) { return __ldg((const uint4*)in + i); },
        [&](int i, const uint4& x) { ((uint4*)out)[i] = x; });
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
  copy_row((T*)p.packed + slot * p.pitch, in, p.source.feature_stride, live ? p.features : 0,
           p.pitch, lane);
}

// One warp a row of the target; one block where slices are summed, for there are few rows then.
// From packed accumulators (slots), or the slices of a sum, to rows; a row without a slot becomes
// 0. What its target adds to a row of the input's gradient where exponentials were kept (they are 0
// at the target) is added in float.
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
  float g = 0.f;
  const bf16* w = nullptr;
  if (p.onehot_g && slot >= 0 && *p.kept >= 0) {
    const int y = p.onehot_target[slot];
    if (y >= 0 && y < p.kept_classes)
      g = p.onehot_g[slot], w = (const bf16*)p.onehot_w + y * p.onehot_ld;
  }
  // Nothing is read that counts for nothing: 0 times an overflow would be nan.
  auto sum = [&](Acc x, Acc weight, T old) {
    x *= factor;
    if (g != 0.f) x += (Acc)g * weight;
    return Element<T>::from(p.accumulate ? widen(old) + x : x);
  };
  int d = first;
  if (p.target.feature_stride == 1 && is_aligned(out) && slot >= 0) {
    const int whole = p.features / 8;
    struct Both {
      Pack<Acc> sums;
      Pack<bf16> weights;
    };
    auto load = [&](int i) {
      Both both = {((const Pack<Acc>*)in)[i], {}};
      if (g != 0.f) both.weights = ((const Pack<bf16>*)w)[i];
      return both;
    };
    in_batches<2>(first, step, whole, load, [&](int i, Both& both) {
      Pack<Acc>& x = both.sums;
      for (int s = 1; s < p.slices; s++) {
        const Pack<Acc> more = ((const Pack<Acc>*)(in + s * p.slice))[i];
#pragma unroll
        for (int j = 0; j < 8; j++) x.x[j] += more.x[j];
      }
      Pack<T> y = {};
      if (p.accumulate) y = ((const Pack<T>*)out)[i];
#pragma unroll
      for (int j = 0; j < 8; j++) y.x[j] = sum(x.x[j], (Acc)widen(both.weights.x[j]), y.x[j]);
      ((Pack<T>*)out)[i] = y;
    });
    d += whole * 8;
  }
  for (; d < p.features; d += step) {
    Acc x = slot < 0 ? (Acc)0 : in[d];
    for (int s = 1; s < p.slices && slot >= 0; s++) x += in[s * p.slice + d];
    T* at = out + d * p.target.feature_stride;
    *at = sum(x, g != 0.f ? (Acc)widen(w[d]) : (Acc)0, p.accumulate ? *at : T{});
  }
}

}  // namespace

KERNEL(gather_rows_2, GatherParams, 256) { gather<u16>(p); }
KERNEL(gather_rows_4, GatherParams, 256) { gather<u32>(p); }
KERNEL(gather_rows_8, GatherParams, 256) { gather<u64>(p); }

KERNEL(scatter_rows_f32_bf16, ScatterParams, 256) { scatter<float, bf16>(p); }
KERNEL(scatter_rows_f32_f16, ScatterParams, 256) { scatter<float, f16>(p); }
KERNEL(scatter_rows_f32_f32, ScatterParams, 256) { scatter<float, float>(p); }
KERNEL(scatter_rows_f64_f64, ScatterParams, 256) { scatter<double, double>(p); }

// -- target logits ------------------------------------------------------------------------------
namespace {

// One warp a (slot, column). Slots past the live rows fill the neutral reference. On the way live
// rows are packed, where the products want that; ignored rows of the output become 0; and the list
// of blocks that a later kernel may add to is emptied.
//
// The row of the input, and where possible the list before it, is asked for before the class is
// known, whose row is next.
template <class T>
__device__ __forceinline__ void target_logits(const TargetParams& p) {
  using Acc = typename Element<T>::Acc;
  constexpr int kPack = 16 / sizeof(T), kBatch = 4;
  const int columns = p.targets.columns, lane = threadIdx.x & 31;
  const i64 job = blockIdx.x * 8ll + threadIdx.x / 32;
  const i64 slot = columns == 1 ? job : job / columns;
  const int k = job - slot * columns;
  if (slot >= p.padded) return;
  const i64 row = row_at(p.list, (int)slot);
  const int count = live_count(p.list);
  const int listed = p.list.slots ? p.list.slots[min(slot, p.list.total - 1)] : 0;
  if (p.gate && blockIdx.x == 0)
#pragma unroll 1
    for (int i = threadIdx.x; i < gate_length(p.list); i += 256) p.gate[i] = 0;
  if (listed < 0 && lane == 0 && slot < p.list.total) ((Acc*)p.out)[job] = (Acc)0;
  T* out = p.packed && k == 0 ? (T*)p.packed + slot * p.pitch : nullptr;
  if (slot >= count) {
    if (out && slot < zeroed_rows(count, p.padded)) copy_row<T>(out, nullptr, 1, 0, p.pitch, lane);
    if (lane == 0 && k == 0) {
      if (p.reference) p.reference[slot] = infinity();
      if (p.target) p.target[slot] = -1;
    }
    return;
  }
  const i64 id = p.targets.ids[row * columns + k];
  const T* e = row_of<T>(p.input, row);
  const i64 es = p.input.feature_stride, ws = p.weight.column_stride;
  const bool wide = es == 1 && ws == 1 && is_aligned(e) && is_aligned(out) &&
                    is_aligned(p.weight.data) && p.weight.row_stride % kPack == 0 &&
                    p.features >= kPack;
  const int whole = wide ? p.features / kPack : 0, last = whole - 1;
  uint4 a[kBatch];
  if (wide) {
#pragma unroll
    for (int j = 0; j < kBatch; j++) a[j] = __ldg((const uint4*)e + min(lane + 32 * j, last));
  }
  const bool padding = p.targets.has_ignore && id == p.targets.ignore,
             valid = !padding && id >= 0 && id < p.targets.classes;
  // Not read without a class: then z is thrown away.
  const T* w = (const T*)p.weight.data + id * p.weight.row_stride;
  Acc z = (Acc)0;
#pragma unroll 1
  for (int first = lane; first < whole; first += 32 * kBatch) {
    const bool more = first - lane + 32 * kBatch < whole;
    uint4 b[kBatch] = {};
    if (valid) {
#pragma unroll
      for (int j = 0; j < kBatch; j++) b[j] = __ldg((const uint4*)w + min(first + 32 * j, last));
    }
#pragma unroll
    for (int j = 0; j < kBatch; j++) {
      const int i = first + 32 * j;
      if (i < whole) {
        if (out) ((uint4*)out)[i] = a[j];
        const T* x = (const T*)&a[j];
        const T* y = (const T*)&b[j];
#pragma unroll
        for (int c = 0; c < kPack; c++) z += widen(x[c]) * widen(y[c]);
      }
      if (more) a[j] = __ldg((const uint4*)e + min(i + 32 * kBatch, last));
    }
  }
  for (int d = whole * kPack + lane; d < (out ? p.pitch : p.features); d += 32) {
    const T x = d < p.features ? e[d * es] : T{};
    if (out) out[d] = x;
    if (valid && d < p.features) z += widen(x) * widen(w[d * ws]);
  }
  z = warp_sum(z);
  if (lane != 0) return;
  if (valid) {
    const Acc bias = p.bias.data
                         ? load_any<Acc>(p.bias.data, (int)p.bias.dtype, id * p.bias.row_stride)
                         : (Acc)0;
    const Acc scale = p.scale_at ? *(const Acc*)p.scale_at : (Acc)p.scale;
    z = logit_map(z, scale, bias, (Acc)p.softcap);
  } else {
    z = padding ? (Acc)0 : not_a_number<Acc>();
  }
  ((Acc*)p.out)[row * columns + k] = z;
  if (p.reference) p.reference[slot] = (float)z;
  if (p.target) p.target[slot] = valid ? (int)id : -1;
}

}  // namespace

// One warp a slot: the class of its target, and the row packed unless rows stay in their places.
// The products write z over the reference of a row that has a class.
KERNEL(target_classes_2, TargetParams, 256) {
  const int slot = (int)row_of_warp(), lane = threadIdx.x & 31;
  if (slot >= p.padded) return;
  const i64 row = row_at(p.list, slot);
  const int count = live_count(p.list);
  const bool packs = p.packed && !(p.in_place && *p.in_place), live = slot < count;
  if (packs && slot < zeroed_rows(count, p.padded))
    copy_row((u16*)p.packed + slot * p.pitch, live ? row_of<u16>(p.input, row) : nullptr,
             p.input.feature_stride, live ? p.features : 0, p.pitch, lane);
  if (lane != 0) return;
  const i64 id = live ? p.targets.ids[row] : -1;
  const bool padding = p.targets.has_ignore && id == p.targets.ignore,
             valid = live && !padding && id >= 0 && id < p.targets.classes;
  p.target[slot] = valid ? (int)id : -1;
  p.reference[slot] = valid || padding || !live ? 0.f : not_a_number<float>();
}

KERNEL(target_logits_bf16, TargetParams, 256) { target_logits<bf16>(p); }
KERNEL(target_logits_f16, TargetParams, 256) { target_logits<f16>(p); }
KERNEL(target_logits_f32, TargetParams, 256) { target_logits<float>(p); }
KERNEL(target_logits_f64, TargetParams, 256) { target_logits<double>(p); }

// -- coefficients of the gradient tile ----------------------------------------------------------
// dz = r (a + b t) + c + d z off the target, with t = z - rest and r = exp(t); at the target c + d
// z + e. rest_entropy = rest - mean over r, so a = g_rest - g_entropy rest_entropy keeps its
// digits.
KERNEL(row_coefficients, CoefficientParams, 256) {
  const int slot = blockIdx.x * 256 + threadIdx.x;
  if (slot >= p.padded) return;
  float a = 0.f, b = 0.f, c = 0.f, d = 0.f, e = 0.f, rest = infinity();
  int target = -1;
  if (slot < live_count(p.list)) {
    const i64 row = row_at(p.list, slot);
    const float norm = p.scalars->inverse;
    auto get = [&](const void* field) { return field ? ((const float*)field)[row] : 0.f; };
    auto grad = [&](const void* field) { return norm * get(field); };
    const float g_entropy = grad(p.grad.entropy),
                g_variance = 2.f / (float)p.classes * grad(p.grad.variance);
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
KERNEL(add_maximum, AddMaximumParams, 256) {
  const int slot = blockIdx.x * 256 + threadIdx.x;
  if (slot >= live_count(p.list)) return;
  const i64 row = row_at(p.list, slot), column = p.saved.argmax[row] - p.column0;
  if (column < 0 || column >= p.width) return;
  const float z = ((const float*)p.saved.max)[row],
              ratio = p.softcap > 0. ? z / (float)p.softcap : 0.f;
  const float g = p.scalars->inverse * ((const float*)p.grad.max)[row] * (1.f - ratio * ratio);
  const i64 at = slot * p.tile.row_stride + column;
  store_any<float>(p.tile.data, (int)p.tile.dtype, at,
                   load_any<float>(p.tile.data, (int)p.tile.dtype, at) + g);
}

// -- vectors ------------------------------------------------------------------------------------
KERNEL(widen_vector, WidenParams, 256) {
  const i64 i = blockIdx.x * 256ll + threadIdx.x;
  if (i >= p.length) return;
  if (p.is_double)
    ((double*)p.out)[i] =
        load_any<double>(p.source.data, (int)p.source.dtype, i * p.source.row_stride);
  else
    ((float*)p.out)[i] =
        load_any<float>(p.source.data, (int)p.source.dtype, i * p.source.row_stride);
}

// store.cu - the row kernels of the stored mode: X = bf16(e^(z - reference) dz/dx) is kept from the
// forward to the backward.
//
// A row's gradient of the logits is factor X off the target and g_target at it, with factor =
// g_rest e^(reference - rest). X[y] is 0: what belongs to the targets is added in float, in the
// products' epilogues.
//   dE = scale (factor (X W) + g_target W[y])
//   dW = Xᵀ (scale factor E), and to row c scale g_target E of every row whose target is c
//
// Blocks of 256 threads, 20 to 100 registers, no spills; 17 KB of shared memory in the lists' role
// of stored_operands, 8 in sum_lists.
#include "logitless/common.cuh"
#include "logitless/statistics/rest.cuh"

using namespace logitless;

namespace {

// dz/dx at a row's target: 1 - (z / softcap)^2.
__device__ __forceinline__ float softcap_slope(const float* logits, i64 row, float softcap) {
  const float u = softcap > 0.f ? logits[row] / softcap : 0.f;
  return fmaf(-u, u, 1.f);
}

}  // namespace

// One block a listed block of 256 slots, one thread a slot.
KERNEL(finish_repair, RepairParams, 256) {
  if ((int)blockIdx.x >= p.gate[0]) return;
  const int slot = p.gate[1 + blockIdx.x] * 256 + threadIdx.x;
  if (slot >= live_count(p.list)) return;
  Rest<float> all = Rest<float>::empty();
  for (int tile = 0; tile < p.tiles; tile++) {
    const float* part = p.part + (i64)tile * p.ld_row + slot;
    all.merge({part[0], part[p.part_plane], 0.f});
  }
  const float rest = all.finish(), distance = fabsf(rest - p.reference[slot]);
  if (p.rest) p.rest[row_at(p.list, slot)] = rest;
  // No class but the target: nothing to store, whatever the reference. Other rows that are not
  // finite stay so.
  if (rest == -infinity()) p.reference[slot] = infinity();
  else if (distance >= 59.f && fabsf(rest) < infinity())
    p.reference[slot] = rest;  // a target at -inf too
}

// The distribution over two sets of classes: with shares p and q = 1 - p of them, its entropy is
// that of the shares and the mean of the sets' own.
KERNEL(merge_rest, MergeRestParams, 256) {
  const i64 row = blockIdx.x * 256ll + threadIdx.x;
  if (row >= p.list.total || (p.list.slots && p.list.slots[row] < 0)) return;
  const float a = p.kept[row], b = p.rest[row], high = fmaxf(a, b), low = fminf(a, b);
  // An infinite maximum is the result; a nan on either side stays.
  const float rest = is_nan(a) || is_nan(b)      ? a + b
                     : fabsf(high) == infinity() ? high
                                                 : high + log1pf(expf(low - high));
  p.rest[row] = rest;
  if (!p.entropy) return;
  const float log_p = a - rest, log_q = b - rest, share_p = expf(log_p), share_q = expf(log_q);
  // A set without a share adds nothing, whatever its entropy.
  float entropy = share_p == 0.f ? 0.f : share_p * (p.kept_entropy[row] - log_p);
  entropy += share_q == 0.f ? 0.f : share_q * (p.entropy[row] - log_q);
  p.entropy[row] = rest == -infinity() ? 0.f : entropy;
}

namespace {

// One block a slot and 8192 classes, four loads in flight a thread. From X to dz: r (a + b t) off
// the target and e at it, with t = ln X + reference - rest and r = e^t; b is 0 but for the entropy
// (kMoments). Normalised and flushed like the tiles that the products make.
template <bool kMoments>
__device__ __forceinline__ void stored_gradient(const StoredTileParams& p) {
  constexpr int kLoads = 4, kStep = 256 * 8;
  const int slot = blockIdx.x, count = live_count(p.list),
            first = blockIdx.y * kLoads * kStep + threadIdx.x * 8;
  if (slot >= zeroed_rows(count, p.ld_row)) return;
  const bf16* x = (const bf16*)p.x + slot * p.x_pitch;
  bf16* tile = (bf16*)p.tile + slot * p.tile_pitch;
  const bool live = slot < count;
  uint4 v[kLoads] = {};
#pragma unroll
  for (int k = 0; k < kLoads; k++)
    if (live && first + k * kStep < p.width) v[k] = *(const uint4*)(x + first + k * kStep);
  const float reference = p.reference[slot], rest = p.rest[slot];
  // Without a class but the target every X is 0; so is every gradient of a row that does not count.
  const float factor = !live || reference == infinity() ? 0.f : expf(reference - rest);
  const float a = live ? p.coef[slot] * factor : 0.f;
  const float b = kMoments && live ? p.coef[p.ld_row + slot] * factor : 0.f;
  const float smallest = p.shift > 0.f ? exp2f(p.shift - 126.f) : 0.f;
  const int target = live && p.target[slot] >= 0 ? p.target[slot] - p.column0 - first : -1;
  float at_target = 0.f;
  if (target >= 0 && target % kStep < 8) {
    at_target = p.coef[4 * (i64)p.ld_row + slot];
    if (at_target != 0.f) at_target *= softcap_slope(p.logits, row_at(p.list, slot), p.softcap);
  }
#pragma unroll
  for (int k = 0; k < kLoads; k++) {
    if (first + k * kStep >= p.width) return;
    bf16* e = (bf16*)&v[k];
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const float r = widen(e[i]);
      const float kept = r * factor < smallest ? 0.f : r;
      float g = a * kept;  // a nan stays
      if (kMoments && kept > 0.f) g = fmaf(b * kept, __logf(kept) + (reference - rest), g);
      e[i] = Element<bf16>::from(k * kStep + i == target ? at_target : g);
    }
    *(uint4*)(tile + first + k * kStep) = v[k];
  }
}

}  // namespace

KERNEL(stored_gradient_bf16, StoredTileParams, 256) {
  if (p.moments) stored_gradient<true>(p);
  else stored_gradient<false>(p);
}

// -- operands of the backward -------------------------------------------------------------------
namespace {

// What a row of X stands for.
struct RowFactors {
  float factor;     // times X: its gradient of the logits off the target
  float passed;     // the same, but for a target that dwarfs it: the input's factor in dW
  float at_target;  // gradient of the target's logit
  float ratio;      // at_target / passed: the target as an entry of X
};

__device__ __forceinline__ RowFactors factors_of(const FactorParams& p, int slot) {
  const i64 row = row_at(p.list, slot), id = p.targets.ids[row];
  const float g = p.g_rest ? p.g_rest[row] : 0.f, reference = p.reference[slot], rest = p.rest[row];
  const bool valid = id >= 0 && id < p.targets.classes;
  RowFactors f;
  f.factor = g == 0.f || reference == infinity() ? 0.f : g * expf(reference - rest);
  f.at_target = p.g_target && valid ? p.g_target[row] : 0.f;
  if (f.at_target != 0.f) f.at_target *= softcap_slope(p.logits, row, p.softcap);
  // Out of range (padding is not live): the row is nan, like its loss.
  if (!valid) f.factor = not_a_number<float>();
  // X spans e^+-60 around the reference: past a ratio of e^80 the row's own part of dW is below the
  // last digit.
  constexpr float kLargest = 5e34f;
  f.passed = fabsf(f.at_target) > kLargest * fabsf(f.factor) ? f.at_target / kLargest : f.factor;
  f.ratio = f.at_target == 0.f ? 0.f : f.at_target / f.passed;
  return f;
}

// One warp a slot: its factors, and its row of the input times them. The row is asked for first.
// And a row of the input's gradient that no product will write.
__device__ __forceinline__ void scale_row(const StoredOperandsParams& p, int slot) {
  constexpr int kBatch = 4;
  const FactorParams& f = p.factors;
  const GatherParams& g = p.scaled;
  const int lane = threadIdx.x & 31, count = live_count(f.list);
  bf16* out = (bf16*)g.packed + slot * g.pitch;
  // Here the warp's number is a row's.
  if (p.clear && slot < f.list.total && f.list.slots[slot] < 0) {
    uint4* nothing = (uint4*)p.clear + (i64)slot * (g.features / 8);
    for (int d = lane; d < g.features / 8; d += 32) nothing[d] = {};
  }
  if (slot >= count) {
    if (slot < zeroed_rows(count, g.padded))
      for (int d = lane; d < g.pitch; d += 32) out[d].bits = 0;
    if (lane == 0 && slot < f.padded)
      f.factor[slot] = f.input_factor[slot] = f.target_factor[slot] = f.ratio[slot] = 0.f;
    return;
  }
  const bf16* in = row_of<bf16>(g.source, row_at(f.list, slot));
  const bool wide =
      g.source.feature_stride == 1 && is_aligned(in) && is_aligned(out) && g.features >= 8;
  const int whole = wide ? g.features / 8 : 0, last = whole - 1;
  Pack<bf16> x[kBatch];
  if (wide) {
#pragma unroll
    for (int j = 0; j < kBatch; j++) x[j] = ((const Pack<bf16>*)in)[min(lane + 32 * j, last)];
  }
  const RowFactors row = factors_of(f, slot);
  const float scale = f.scale_at ? *f.scale_at : f.scale,
              inverse = f.scalars ? f.scalars->inverse : 1.f;
  const float outer = f.scalars ? inverse : scale, factor = outer * row.passed;
  if (lane == 0) {
    f.factor[slot] = inverse * row.passed;
    f.input_factor[slot] = outer * row.factor;
    f.target_factor[slot] = scale * row.at_target;
    f.ratio[slot] = row.ratio;
  }
#pragma unroll 1
  for (int first = lane; first < whole; first += 32 * kBatch) {
    const bool more = first - lane + 32 * kBatch < whole;
#pragma unroll
    for (int j = 0; j < kBatch; j++) {
      const int i = first + 32 * j;
      Pack<bf16> y;
#pragma unroll
      for (int c = 0; c < 8; c++) y.x[c] = Element<bf16>::from(factor * widen(x[j].x[c]));
      if (i < whole) ((Pack<bf16>*)out)[i] = y;
      if (more) x[j] = ((const Pack<bf16>*)in)[min(i + 32 * kBatch, last)];
    }
  }
  for (int d = 8 * whole + lane; d < g.pitch; d += 32)
    out[d] = d < g.features ? Element<bf16>::from(factor * widen(in[d * g.source.feature_stride]))
                            : bf16{0};
}

// A block makes the lists of 512 classes: its warps count their shares of the slots, and write them
// where the counts say. Integer counts only, and every warp goes through its share in order: the
// same lists every time. Targets are read 16 at a time, for one by one the block would wait for the
// L2 at every 32 slots; values are made of the cotangents at the end, a thread an entry. 17 KB of
// shared memory.
__device__ __forceinline__ void list_targets(const StoredOperandsParams& p, int block) {
  constexpr int kClasses = 512, kWarps = 8, kBatch = 16;
  // Counts, then where the warp's next entry of the class goes.
  __shared__ int cursor[kWarps][kClasses];
  __shared__ int lower[kWarps], warp_total[kWarps];
  const ListTargetsParams& l = p.lists;
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31, low = block * kClasses;
  const int count = max(live_count(p.factors.list), 0),
            share = (count + 32 * kWarps - 1) / (32 * kWarps) * 32;
  const int begin = min(warp * share, count), end = min(begin + share, count);
#pragma unroll
  for (int i = 0; i < kClasses / 32; i++) cursor[warp][32 * i + lane] = 0;
  __syncwarp();  // zeros before counts, which are the warp's own

  int before = 0;
  auto target = [&](int i) { return l.target[i]; };
  in_batches<kBatch>(begin + lane, 32, end, target, [&](int, int t) {
    if (u32(t - low) < kClasses) atomicAdd(&cursor[warp][t - low], 1);
    before += u32(t) < u32(low);  // not -1, which is none
  });
  before = warp_sum(before);
  if (lane == 0) lower[warp] = before;
  __syncthreads();  // every warp's counts

  int both[2] = {0, 0};  // each thread has two neighbouring classes
#pragma unroll
  for (int c = 0; c < 2; c++)
    for (int w = 0; w < kWarps; w++) both[c] += cursor[w][2 * threadIdx.x + c];
  int through = both[0] + both[1];
#pragma unroll
  for (int o = 1; o < 32; o *= 2) {
    const int other = __shfl_up_sync(kFullWarp, through, o);
    through += lane >= o ? other : 0;
  }
  if (lane == 31) warp_total[warp] = through;
  __syncthreads();  // every warp's total
  int first_entry = 0, entries = 0;
  int at = through - both[0] - both[1];
  for (int w = 0; w < kWarps; w++) {
    first_entry += lower[w];
    entries += warp_total[w];
    at += lower[w] + (w < warp ? warp_total[w] : 0);
  }
#pragma unroll
  for (int c = 0; c < 2; c++) {
    const int i = 2 * threadIdx.x + c;
    // One past the last class: the end of its list.
    if (low + i <= l.classes) l.start[low + i] = at;
    for (int w = 0; w < kWarps; w++) {
      const int mine = cursor[w][i];
      cursor[w][i] = at;
      at += mine;
    }
  }
  __syncthreads();  // every cursor

#pragma unroll 1
  for (int first = begin; first < end; first += 32 * kBatch) {
    int targets[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; j++) targets[j] = target(min(first + 32 * j + lane, end - 1));
#pragma unroll
    for (int j = 0; j < kBatch; j++) {
      const int i = first + 32 * j + lane, t = i < end ? targets[j] : -1;
      const bool mine = u32(t - low) < kClasses;
      if (!__ballot_sync(kFullWarp, mine)) continue;
      const u32 same = __match_any_sync(kFullWarp, mine ? t : -1);
      const int rank = __popc(same & ((1u << lane) - 1));
      int to = 0;
      if (mine) to = cursor[warp][t - low] + rank;
      __syncwarp();  // read before the first of the equals moves it
      if (mine && rank == 0) cursor[warp][t - low] += __popc(same);
      __syncwarp();  // moved before the next 32
      if (mine) l.rows[to] = i;
    }
  }
  __syncthreads();  // every slot of the block's entries

  const float scale = p.factors.scale_at ? *p.factors.scale_at : p.factors.scale;
  const float of_ratio = p.factors.scalars ? scale * p.factors.scalars->g : 1.f;
#pragma unroll 1
  for (int e = first_entry + threadIdx.x; e < first_entry + entries; e += 256) {
    const int slot = l.rows[e];
    const RowFactors f = factors_of(p.factors, slot);
    l.values[e] = l.by_slot ? of_ratio * f.ratio : scale * f.at_target;
    if (!l.by_slot) l.rows[e] = (int)row_at(p.factors.list, slot);
  }
}

}  // namespace

// What the backward's products read beside X. Two roles in one launch, for neither fills the
// device: the first blocks list the slots by class, the others take a row a warp.
KERNEL(stored_operands_bf16, StoredOperandsParams, 256) {
  const int block = (int)blockIdx.x - p.list_blocks;
  if (block < 0) list_targets(p, blockIdx.x);
  else scale_row(p, block * 8 + (int)threadIdx.x / 32);
}

// A frequent token has hundreds of rows, and dW's epilogue would wait for one warp to walk their
// list: it finds their sum instead. Lists of kLong entries begin in different windows of as many
// entries, and hold the last entry of theirs: each warp looks up one window's, and the block sums
// what they find, 256 columns of it. A warp takes an eighth of a list, eight rows in flight; the
// eighths are added in order. 8 KB of shared memory.
KERNEL(sum_lists_bf16, SumListsParams, 256) {
  constexpr int kLong = 16, kWarps = 8, kLoads = 4, kBatch = 8;
  __shared__ int begin[kWarps], end[kWarps];
  __shared__ float part[kWarps][64 * kLoads];
  const ListTargetsParams& l = p.lists;
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  if (lane == 0) {
    const int window = kLong * (blockIdx.x * kWarps + warp), e = window + kLong - 1;
    int first = 0, last = 0;
    if (e < l.start[l.classes]) {
      const int row = l.rows[e], c = l.by_slot ? l.target[row] : (int)p.ids[row];
      first = l.start[c], last = l.start[c + 1];
      if (first < window || last - first < kLong) first = last = 0;
    }
    begin[warp] = first, end[warp] = last;
  }
  __syncthreads();  // every window's list
  const int column = blockIdx.y * (64 * kLoads) + 2 * lane;
#pragma unroll 1
  for (int w = 0; w < kWarps; w++) {
    if (begin[w] == end[w]) continue;
    const int share = (end[w] - begin[w] + kWarps - 1) / kWarps, first = begin[w] + warp * share;
    const int last = min(first + share, end[w]);
    float sum[2 * kLoads] = {};
#pragma unroll 1
    for (int at = first; at < last; at += 32) {
      const int mine = min(at + lane, last - 1), entries = min(32, last - at), row = l.rows[mine];
      const float g = l.values[mine];
#pragma unroll 1
      for (int k = 0; k < entries; k += kBatch) {
        u32 x[kBatch][kLoads];
#pragma unroll
        for (int j = 0; j < kBatch; j++) {
          const u16* from =
              (const u16*)p.source + __shfl_sync(kFullWarp, row, min(k + j, entries - 1)) * p.pitch;
#pragma unroll
          for (int i = 0; i < kLoads; i++)
            x[j][i] = __ldg((const u32*)(from + min(column + 64 * i, p.features - 2)));
        }
#pragma unroll
        for (int j = 0; j < kBatch; j++) {
          const float factor = __shfl_sync(kFullWarp, g, min(k + j, 31));
          if (k + j >= entries) break;
#pragma unroll
          for (int i = 0; i < kLoads; i++) {
            sum[2 * i] = fmaf(factor, __uint_as_float(x[j][i] << 16), sum[2 * i]);
            sum[2 * i + 1] = fmaf(factor, __uint_as_float(x[j][i] & 0xffff0000u), sum[2 * i + 1]);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2 * kLoads; i++) part[warp][64 * (i / 2) + 2 * lane + i % 2] = sum[i];
    __syncthreads();  // every warp's eighth
    const int mine = blockIdx.y * (64 * kLoads) + threadIdx.x;
    float total = 0.f;
#pragma unroll
    for (int v = 0; v < kWarps; v++) total += part[v][threadIdx.x];
    if (mine < p.features) p.sums[(i64)(begin[w] / kLong) * p.features + mine] = total;
    __syncthreads();  // read before the next list's eighths
  }
}

namespace {

// One warp a row of the target.
template <class T>
__device__ __forceinline__ void unpack(const UnpackParams& p) {
  const i64 row = row_of_warp();
  if (row >= p.list.total) return;
  const int slot = p.list.slots ? p.list.slots[row] : (int)row, lane = threadIdx.x & 31;
  T* out = const_cast<T*>(row_of<T>(p.target, row));
  const bf16* in = (const bf16*)p.packed + slot * p.pitch;
  auto sum = [&](float x, T old) { return Element<T>::from(p.accumulate ? widen(old) + x : x); };
  int d = lane;
  if (p.target.feature_stride == 1 && is_aligned(out) && slot >= 0) {
    const int whole = p.features / 8;
    in_batches<4>(
        lane, 32, whole, [&](int i) { return ((const Pack<bf16>*)in)[i]; },
        [&](int i, const Pack<bf16>& x) {
          Pack<T> y = {};
          if (p.accumulate) y = ((const Pack<T>*)out)[i];
#pragma unroll
          for (int j = 0; j < 8; j++) y.x[j] = sum(widen(x.x[j]), y.x[j]);
          ((Pack<T>*)out)[i] = y;
        });
    d += whole * 8;
  }
  for (; d < p.features; d += 32) {
    T* at = out + d * p.target.feature_stride;
    *at = sum(slot < 0 ? 0.f : widen(in[d]), p.accumulate ? *at : T{});
  }
}

}  // namespace

KERNEL(unpack_rows_bf16, UnpackParams, 256) { unpack<bf16>(p); }
KERNEL(unpack_rows_f32, UnpackParams, 256) { unpack<float>(p); }

// -- the frozen head ----------------------------------------------------------------------------
// dE_i = scale (v_i sums_i + g_i W[y]), v_i = g_rest e^(reference - rest): one rounding. One block
// a row of the input.
namespace {

template <class T>
__device__ __forceinline__ void frozen_rows(const FrozenParams& p) {
  const i64 row = blockIdx.x;
  const int slot = p.list.slots ? p.list.slots[row] : (int)row;
  float v = 0.f, g = 0.f;
  i64 id = 0;
  if (slot >= 0) {
    const float scale = p.scale_at ? *p.scale_at : p.scale, reference = p.reference[slot];
    const float g_rest = p.g_rest ? p.g_rest[row] : 0.f,
                g_target = p.g_target ? p.g_target[row] : 0.f;
    id = p.targets.ids[row];
    // Out of range (padding has no slot): the row is nan, like its loss.
    if (id < 0 || id >= p.targets.classes) {
      v = not_a_number<float>();
      id = 0;
    } else {
      if (g_rest != 0.f && reference != infinity())
        v = scale * g_rest * expf(reference - p.rest[row]);
      if (g_target != 0.f) g = scale * g_target * softcap_slope(p.logits, row, p.softcap);
    }
  }
  T* out = const_cast<T*>(row_of<T>(p.out, row));
  const float* sums = p.sums + (i64)max(slot, 0) * p.pitch;
  const bf16* w = (const bf16*)p.weight + id * p.weight_pitch;
  const int slices = v == 0.f ? 0 : max(p.slices, 1);
  // Nothing is read that counts for nothing: 0 times an overflow would be nan.
  auto value = [&](float sum, float weight) {
    const float x = v != 0.f ? v * sum : 0.f;
    return g != 0.f ? fmaf(g, weight, x) : x;
  };
  int d = threadIdx.x;
  if (p.out.feature_stride == 1 && (u64)out % 16 == 0 && !p.accumulate) {
    const int whole = p.features / 8;
    for (int i = threadIdx.x; i < whole; i += blockDim.x) {
      float x[8] = {};
      for (int s = 0; s < slices; s++) {
        const float4* from = (const float4*)(sums + s * p.slice) + 2 * i;
        const float4 low = __ldg(from), high = __ldg(from + 1);
        x[0] += low.x, x[1] += low.y, x[2] += low.z, x[3] += low.w;
        x[4] += high.x, x[5] += high.y, x[6] += high.z, x[7] += high.w;
      }
      const uint4 weights = __ldg((const uint4*)w + i);
      __align__(16) T y[8];
#pragma unroll
      for (int j = 0; j < 8; j++)
        y[j] = Element<T>::from(value(x[j], widen(((const bf16*)&weights)[j])));
#pragma unroll
      for (int j = 0; j < (int)sizeof(T) / 2; j++)
        ((uint4*)out)[i * (sizeof(T) / 2) + j] = ((const uint4*)y)[j];
    }
    d += whole * 8;
  }
  for (; d < p.features; d += blockDim.x) {
    T* at = out + d * p.out.feature_stride;
    float sum = 0.f;
    for (int s = 0; s < slices; s++) sum += sums[s * p.slice + d];
    const float x = value(sum, widen(w[d]));
    *at = Element<T>::from(p.accumulate ? widen(*at) + x : x);
  }
}

}  // namespace

KERNEL(frozen_rows_bf16, FrozenParams, 256) { frozen_rows<bf16>(p); }
KERNEL(frozen_rows_f32, FrozenParams, 256) { frozen_rows<float>(p); }

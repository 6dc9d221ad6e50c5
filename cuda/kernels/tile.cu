// tile.cu - every statistic, and every gradient, from a tile of logits in memory.
//
// The general path: a product writes z (rows, width) in accumulators, and one block per row folds it into the row's state
// or turns it into dz. It serves what the epilogues of the tensor-core kernels do not: several targets, powers, class
// vectors, dense targets, top-k, float and double. One block of 256 threads a row walks pieces of kPiece classes held in
// shared memory; each statistic reads the piece on its own. All folds run in a fixed order.
#include "logitless/common.cuh"
#include "logitless/statistics/maximum.cuh"
#include "logitless/statistics/moments.cuh"
#include "logitless/statistics/rest.cuh"

using namespace logitless;

namespace {

constexpr int kThreads = 256, kPiece = 2048;

// Folds one value a thread in a fixed order; T has merge(). Every thread gets the result.
template <class T>
__device__ T block_merge(const T& mine, void* scratch /* kThreads / 32 of T */) {
  T* shared = (T*)scratch;
  T x = mine;
#pragma unroll
  for (int o = 16; o; o >>= 1) {
    T other;
    const unsigned* from = (const unsigned*)&x;
    unsigned* to = (unsigned*)&other;
#pragma unroll
    for (int i = 0; i < (int)(sizeof(T) / 4); i++) to[i] = __shfl_down_sync(kFullWarp, from[i], o);
    x.merge(other);
  }
  __syncthreads();  // the last result has been read
  if ((threadIdx.x & 31) == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  T all = shared[0];
  for (int i = 1; i < kThreads / 32; i++) all.merge(shared[i]);
  return all;
}

template <class Acc>
struct Sum {
  Acc value;
  __device__ __forceinline__ void merge(const Sum& other) { value += other.value; }
};
// Largest logit outside the targets; nan is passed over, the sums carry it.
template <class Acc>
struct Extreme {
  Acc value;
  i64 at;
  __device__ __forceinline__ void merge(const Extreme& other) {
    if (other.value > value || (other.value == value && other.at < at)) *this = other;
  }
};

// The row's state, in accumulators: fixed part, then powers x 2, C weighted sums, C weighted rests, k values, k ids.
enum Slot { kMaxSlot, kExcess, kMoment, kSumSlot, kSumSqSlot, kMeanSlot, kM2Slot, kTopValue, kTopId, kDotSlot, kFixedSlots };

// Ids in a slot of the accumulator's type, bit for bit.
__device__ __forceinline__ void put_id(float& slot, int id) { slot = __int_as_float(id); }
__device__ __forceinline__ void put_id(double& slot, int id) { slot = __longlong_as_double((i64)id); }
__device__ __forceinline__ int get_id(float slot) { return __float_as_int(slot); }
__device__ __forceinline__ int get_id(double slot) { return (int)__double_as_longlong(slot); }
__device__ __forceinline__ void put_id(float& slot, i64 id) { put_id(slot, (int)id); }
__device__ __forceinline__ void put_id(double& slot, i64 id) { put_id(slot, (int)id); }
constexpr int kNoId = 0x7fffffff;

// The order of topk: larger first, lower id among equals, nan before everything.
template <class Acc>
__device__ __forceinline__ bool before(const Maximum<Acc>& x, const Maximum<Acc>& y) {
  Maximum<Acc> both = y;
  both.merge(x);
  return both.id == x.id && x.id != y.id;
}

template <class Acc>
struct Block {
  Acc z[kPiece];
  u32 outside[kPiece / 32];  // bit: the class is one of the row's targets
  __align__(16) unsigned char scratch[kThreads / 32 * 32];
};

__device__ __forceinline__ bool is_target(const u32* bits, int j) { return bits[j >> 5] >> (j & 31) & 1; }

// Exponentials of y(z) over the classes outside the targets.
template <class Acc, class Y>
__device__ Rest<Acc> exp_sum(Block<Acc>& s, int n, Y y) {
  Extreme<Acc> top = {-infinite<Acc>(), kPiece};
  for (int j = threadIdx.x; j < n; j += kThreads)
    if (!is_target(s.outside, j)) top.merge({y(s.z[j]), j});
  top = block_merge(top, s.scratch);
  const Acc base = top.value == -infinite<Acc>() ? (Acc)0 : top.value;
  Sum<Acc> excess = {0}, moment = {0};
  for (int j = threadIdx.x; j < n; j += kThreads)
    if (!is_target(s.outside, j) && j != top.at) {
      const Acc t = y(s.z[j]) - base, e = exp(t);
      excess.value += e;
      moment.value += e == (Acc)0 ? (Acc)0 : t * e;
    }
  excess = block_merge(excess, s.scratch);
  moment = block_merge(moment, s.scratch);
  return {top.value, excess.value, moment.value};
}

template <class Acc>
__device__ void mark_targets(Block<Acc>& s, const Targets& t, i64 row, i64 class0, int n) {
  for (int i = threadIdx.x; i < (n + 31) / 32; i += kThreads) s.outside[i] = 0;
  __syncthreads();
  for (int k = threadIdx.x; k < t.columns; k += kThreads) {
    const i64 id = t.ids[row * t.columns + k];
    const i64 at = id - class0;
    if (!(t.has_ignore && id == t.ignore) && at >= 0 && at < n) atomicOr(&s.outside[at >> 5], 1u << (at & 31));
  }
  __syncthreads();
}

// An id outside the classes that is not padding: the whole row is nan.
__device__ bool has_bad_id(const Targets& t, i64 row) {
  for (int k = 0; k < t.columns; k++) {
    const i64 id = t.ids[row * t.columns + k];
    if (!(t.has_ignore && id == t.ignore) && (id < 0 || id >= t.classes)) return true;
  }
  return false;
}

// -- statistics -------------------------------------------------------------------------------------------------------
template <class Acc>
__device__ void absorb_topk(Block<Acc>& s, int n, i64 class0, int k, Acc* values, Acc* ids) {
  // Nothing of the piece beats the list's last entry: the common case after the first pieces.
  Maximum<Acc> best = Maximum<Acc>::empty();
  for (int j = threadIdx.x; j < n; j += kThreads) best.absorb(s.z[j], class0 + j);
  best = block_merge(best, s.scratch);
  if (!before(best, Maximum<Acc>{values[k - 1], get_id(ids[k - 1])})) return;
  // Selection in order: each step takes the best entry of piece and list that comes after the previous one. The list is
  // rewritten behind the reads: entry i of the new list never needs an old entry before its own old position.
  extern __shared__ __align__(16) unsigned char list_bytes[];
  Acc* old_values = (Acc*)list_bytes;
  int* old_ids = (int*)(old_values + k);
  __syncthreads();
  for (int i = threadIdx.x; i < k; i += kThreads) {
    old_values[i] = values[i];
    old_ids[i] = get_id(ids[i]);
  }
  __syncthreads();
  Maximum<Acc> previous = {};
  for (int i = 0; i < k; i++) {
    Maximum<Acc> next = Maximum<Acc>::empty();
    auto offer = [&](const Maximum<Acc>& x) {
      if (i == 0 || before(previous, x)) next.merge(x);
    };
    for (int j = threadIdx.x; j < n; j += kThreads) offer({s.z[j], class0 + j});
    for (int j = threadIdx.x; j < k; j += kThreads)
      if (old_ids[j] != kNoId) offer({old_values[j], old_ids[j]});
    previous = block_merge(next, s.scratch);
    if (threadIdx.x == 0) {
      values[i] = previous.value;
      put_id(ids[i], previous.id);
    }
  }
  __syncthreads();
}

template <class Acc>
__device__ void absorb(const TileParams& p, Block<Acc>& s, Acc* state, i64 row, i64 class0, int n, i64 seen) {
  const bool leader = threadIdx.x == 0;
  auto fold_sum = [&](auto f) {
    Sum<Acc> x = {0};
    for (int j = threadIdx.x; j < n; j += kThreads) x.value += f(j);
    return block_merge(x, s.scratch).value;
  };
  if (p.mask & (kRest | kEntropy | kWeightedRest)) {
    const Rest<Acc> piece = exp_sum(s, n, [](Acc z) { return z; });
    Rest<Acc> all = {state[kMaxSlot], state[kExcess], state[kMoment]};
    const Acc old_maximum = all.maximum;
    all.merge(piece);
    if (p.mask & kWeightedRest) {
      const Acc old_scale = old_maximum == all.maximum ? (Acc)1 : exp(old_maximum - all.maximum);
      const Acc base = all.maximum == -infinite<Acc>() ? (Acc)0 : all.maximum;
      Acc* out = state + kFixedSlots + 2 * p.powers + p.vector_count;
      for (int c = 0; c < p.vector_count; c++) {
        const Acc* v = (const Acc*)p.vectors + c * p.vector_stride;
        const Acc total = fold_sum([&](int j) {
          if (is_target(s.outside, j)) return (Acc)0;
          const Acc e = exp(s.z[j] - base);
          return e == (Acc)0 ? (Acc)0 : e * v[(class0 + j) * p.vector_column];
        });
        if (leader) out[c] = (out[c] == (Acc)0 ? (Acc)0 : out[c] * old_scale) + total;
      }
    }
    __syncthreads();
    if (leader) {
      state[kMaxSlot] = all.maximum;
      state[kExcess] = all.excess;
      state[kMoment] = all.moment;
    }
  }
  if (p.mask & kSum) {
    const Acc x = fold_sum([&](int j) { return s.z[j]; });
    if (leader) state[kSumSlot] += x;
  }
  if (p.mask & kSumSq) {
    const Acc x = fold_sum([&](int j) { return s.z[j] * s.z[j]; });
    if (leader) state[kSumSqSlot] += x;
  }
  if (p.mask & kVariance) {
    const Acc total = fold_sum([&](int j) { return s.z[j]; }), mean = total / (Acc)n;
    const Acc deviations = fold_sum([&](int j) { return (s.z[j] - mean) * (s.z[j] - mean); });
    if (leader) {
      Moments<Acc> all = {(Acc)seen, state[kMeanSlot], state[kM2Slot]};
      all.merge(Moments<Acc>::block((Acc)n, total, deviations));
      state[kMeanSlot] = all.mean;
      state[kM2Slot] = all.deviations;
    }
  }
  if (p.mask & kMax) {
    Maximum<Acc> best = Maximum<Acc>::empty();
    for (int j = threadIdx.x; j < n; j += kThreads) best.absorb(s.z[j], class0 + j);
    best = block_merge(best, s.scratch);
    if (leader) {
      Maximum<Acc> all = {state[kTopValue], get_id(state[kTopId])};
      all.merge(best);
      state[kTopValue] = all.value;
      put_id(state[kTopId], all.id);
    }
  }
  if (p.mask & kRestPower)
    for (int i = 0; i < p.powers; i++) {
      const Acc m = (Acc)p.power[i];
      const Rest<Acc> piece = exp_sum(s, n, [m](Acc z) { return m * z; });
      if (leader) {
        Rest<Acc> all = {state[kFixedSlots + 2 * i], state[kFixedSlots + 2 * i + 1], 0};
        all.merge(piece);
        state[kFixedSlots + 2 * i] = all.maximum;
        state[kFixedSlots + 2 * i + 1] = all.excess;
      }
    }
  if (p.mask & kWeightedSum)
    for (int c = 0; c < p.vector_count; c++) {
      const Acc* v = (const Acc*)p.vectors + c * p.vector_stride;
      const Acc x = fold_sum([&](int j) {
        const Acc w = v[(class0 + j) * p.vector_column];
        return w == (Acc)0 ? (Acc)0 : w * s.z[j];
      });
      if (leader) state[kFixedSlots + 2 * p.powers + c] += x;
    }
  if (p.mask & kDot) {
    const Acc x = fold_sum([&](int j) {
      const Acc q = load_any<Acc>(p.dense.data, (int)p.dense.dtype, row * p.dense.row_stride + (class0 + j) * p.dense.column_stride);
      return q == (Acc)0 ? (Acc)0 : q * s.z[j];
    });
    if (leader) state[kDotSlot] += x;
  }
  if (p.mask & kTopk) {
    Acc* values = state + kFixedSlots + 2 * p.powers + 2 * p.vector_count;
    absorb_topk(s, n, class0, p.topk, values, values + p.topk);
  }
}

// Outputs of a row from its state; an ignored row (state null) gets 0 and -1.
template <class Acc>
__device__ void finish(const TileParams& p, const Acc* state, i64 row, bool bad) {
  const Fields& o = p.saved;
  const Acc poison = bad ? not_a_number<Acc>() : (Acc)0;
  auto put = [&](void* field, i64 at, Acc x) {
    if (field) ((Acc*)field)[at] = state ? x + poison : (Acc)0;
  };
  const Acc none[kFixedSlots] = {};
  const Acc* f = state ? state : none;
  if (threadIdx.x == 0) {
    const Rest<Acc> rest = {f[kMaxSlot], f[kExcess], f[kMoment]};
    put(o.rest, row, rest.finish());
    // No class but the targets: no distribution, entropy 0.
    put(o.entropy, row, rest.maximum == -infinite<Acc>() ? rest.excess : rest.entropy());
    put(o.sum, row, f[kSumSlot]);
    put(o.sum_sq, row, f[kSumSqSlot]);
    put(o.mean, row, f[kMeanSlot]);
    put(o.variance, row, f[kM2Slot] / (Acc)p.targets.classes);
    put(o.max, row, f[kTopValue]);
    if (o.argmax) o.argmax[row] = state ? get_id(f[kTopId]) : -1;
    put(o.dot, row, f[kDotSlot]);
  }
  for (int i = threadIdx.x; i < p.powers; i += kThreads) {
    Rest<Acc> x = Rest<Acc>::empty();
    if (state) {
      x.maximum = state[kFixedSlots + 2 * i];
      x.excess = state[kFixedSlots + 2 * i + 1];
    }
    put(o.rest_power, row * p.powers + i, x.finish());
  }
  const int vectors = kFixedSlots + 2 * p.powers, lists = vectors + 2 * p.vector_count;
  for (int c = threadIdx.x; c < p.vector_count; c += kThreads) {
    put(o.weighted_sum, row * p.vector_count + c, state ? state[vectors + c] : (Acc)0);
    const Acc total = (Acc)1 + f[kExcess];
    put(o.weighted_rest, row * p.vector_count + c,
        state && f[kMaxSlot] != -infinite<Acc>() ? state[vectors + p.vector_count + c] / total : (Acc)0);
  }
  for (int i = threadIdx.x; i < p.topk; i += kThreads) {
    put(o.topk_values, row * p.topk + i, state ? state[lists + i] : (Acc)0);
    if (o.topk_ids) o.topk_ids[row * p.topk + i] = state ? get_id(state[lists + p.topk + i]) : -1;
  }
}

// One block a row of the batch (not a slot), so that the last tile also writes the ignored ones.
template <class Acc>
__device__ __forceinline__ void tile_statistics(const TileParams& p) {
  __shared__ Block<Acc> s;
  const i64 row = blockIdx.x;
  const int slot = p.list.slots ? p.list.slots[row] : (int)row;
  if (slot < 0) {
    if (p.last) finish<Acc>(p, nullptr, row, false);
    return;
  }
  Acc* state = (Acc*)p.state + (i64)slot * p.state_size;
  if (p.first) {
    for (int i = threadIdx.x; i < p.state_size; i += kThreads) {
      const int lists = kFixedSlots + 2 * p.powers + 2 * p.vector_count;
      const bool maximum = i == kMaxSlot || i == kTopValue || (i >= kFixedSlots && i < kFixedSlots + 2 * p.powers && (i - kFixedSlots) % 2 == 0) ||
                           (i >= lists && i < lists + p.topk);
      state[i] = maximum ? -infinite<Acc>() : (Acc)0;
      if (i == kTopId || i >= lists + p.topk) put_id(state[i], kNoId);
    }
    __syncthreads();
  }
  const Acc* z = (const Acc*)p.z + (i64)slot * p.z_pitch;
  for (int at = 0; at < p.width; at += kPiece) {
    const int n = min(kPiece, p.width - at);
    __syncthreads();
    for (int j = threadIdx.x; j < n; j += kThreads) s.z[j] = z[at + j];
    mark_targets(s, p.targets, row, p.column0 + at, n);
    absorb(p, s, state, row, p.column0 + at, n, p.column0 + at);
    __syncthreads();
  }
  if (p.last) finish(p, state, row, has_bad_id(p.targets, row));
}

// -- gradient ---------------------------------------------------------------------------------------------------------
// Scalars of a row that every class needs.
template <class Acc>
struct RowScalars {
  Acc rest, a, b, sum, sum_sq, variance, mean, dot;
};

template <class Acc, class T>
__device__ __forceinline__ void tile_gradient(const TileParams& p) {
  __shared__ Acc z[kPiece];
  __shared__ Acc dz[kPiece];
  __shared__ u32 outside[kPiece / 32];
  __shared__ RowScalars<Acc> s;
  const int slot = blockIdx.x, count = live_count(p.list);
  T* out = (T*)p.dx + (i64)slot * p.dx_pitch;
  if (slot >= count) {
    if (p.dots && p.first && threadIdx.x == 0 && slot < p.list.total) p.dots[slot] = 0.;
    if (slot < zeroed_rows(count, p.padded))
      for (int j = threadIdx.x; j < p.dx_pitch; j += kThreads) out[j] = Element<T>::from((Acc)0);
    return;
  }
  const i64 row = p.list.rows ? p.list.rows[slot] : slot;
  const Acc norm = sizeof(Acc) == 8 ? (Acc)p.scalars->inverse_wide : (Acc)p.scalars->inverse;
  auto get = [&](const void* field, i64 at) { return field ? ((const Acc*)field)[at] : (Acc)0; };
  if (threadIdx.x == 0) {
    // At exponent -inf a class has no share; a row without classes but its targets has rest -inf, where every share is 0.
    const Acc rest = get(p.saved.rest, row), entropy = get(p.grad.entropy, row);
    s.rest = rest == -infinite<Acc>() ? infinite<Acc>() : rest;
    s.a = get(p.grad.rest, row) - (entropy == (Acc)0 ? (Acc)0 : entropy * get(p.saved.entropy, row));
    s.b = -entropy;
    for (int c = 0; c < p.vector_count; c++) {
      const Acc g = get(p.grad.weighted_rest, row * p.vector_count + c);
      if (g != (Acc)0) s.a -= g * get(p.saved.weighted_rest, row * p.vector_count + c);
    }
    if (has_bad_id(p.targets, row)) s.a = not_a_number<Acc>();
    s.sum = get(p.grad.sum, row) + get(p.grad.mean, row) / (Acc)p.targets.classes;
    s.sum_sq = (Acc)2 * get(p.grad.sum_sq, row);
    s.variance = (Acc)2 / (Acc)p.targets.classes * get(p.grad.variance, row);
    s.mean = get(p.saved.mean, row);
    s.dot = get(p.grad.dot, row);
  }
  const Acc* from = (const Acc*)p.z + (i64)slot * p.z_pitch;
  const bool exponentials = p.grad.rest || p.grad.entropy || p.grad.weighted_rest || has_bad_id(p.targets, row);
  const Acc slope = p.softcap > 0. ? (Acc)1 / (Acc)p.softcap : (Acc)0;
  const Acc scale = p.scale_at ? *(const Acc*)p.scale_at : (Acc)p.scale;
  Sum<double> dot = {0.};
  for (int at = 0; at < p.width; at += kPiece) {
    const int n = min(kPiece, p.width - at);
    const i64 class0 = p.column0 + at;
    __syncthreads();
    for (int i = threadIdx.x; i < (n + 31) / 32; i += kThreads) outside[i] = 0;
    __syncthreads();
    for (int k = threadIdx.x; k < p.targets.columns; k += kThreads) {
      const i64 id = p.targets.ids[row * p.targets.columns + k], j = id - class0;
      if (!(p.targets.has_ignore && id == p.targets.ignore) && j >= 0 && j < n) atomicOr(&outside[j >> 5], 1u << (j & 31));
    }
    __syncthreads();
    for (int j = threadIdx.x; j < n; j += kThreads) {
      Acc x = from[at + j];
      if (p.dots) x = logit_map(x, scale, p.bias ? ((const Acc*)p.bias)[at + j] : (Acc)0, (Acc)p.softcap);
      const bool rest = !is_target(outside, j);
      Acc g = s.sum;
      if (s.sum_sq != (Acc)0) g += s.sum_sq * x;
      if (s.variance != (Acc)0) g += s.variance * (x - s.mean);
      if (exponentials && rest) {
        const Acc t = x - s.rest, r = exp(t);
        if (r != (Acc)0) {
          Acc inner = s.a + s.b * t;
          for (int c = 0; c < p.vector_count; c++) {
            const Acc gc = get(p.grad.weighted_rest, row * p.vector_count + c);
            if (gc != (Acc)0) inner += gc * ((const Acc*)p.vectors)[c * p.vector_stride + (class0 + j) * p.vector_column];
          }
          g += r * inner;
        }
      }
      if (p.grad.rest_power && rest)
        for (int i = 0; i < p.powers; i++) {
          const Acc m = (Acc)p.power[i], gm = get(p.grad.rest_power, row * p.powers + i);
          if (gm == (Acc)0) continue;
          const Acc e = exp(m * x - get(p.saved.rest_power, row * p.powers + i));
          if (e != (Acc)0) g += m * gm * e;
        }
      if (p.grad.weighted_sum)
        for (int c = 0; c < p.vector_count; c++) {
          const Acc gc = get(p.grad.weighted_sum, row * p.vector_count + c);
          if (gc != (Acc)0) g += gc * ((const Acc*)p.vectors)[c * p.vector_stride + (class0 + j) * p.vector_column];
        }
      if (p.dense.data) {
        if (s.dot != (Acc)0)
          g += s.dot * load_any<Acc>(p.dense.data, (int)p.dense.dtype, row * p.dense.row_stride + (class0 + j) * p.dense.column_stride);
      }
      if (p.d_dense.data)
        store_any<Acc>(p.d_dense.data, (int)p.d_dense.dtype, row * p.d_dense.row_stride + (class0 + j) * p.d_dense.column_stride,
                       s.dot == (Acc)0 ? (Acc)0 : s.dot * x);
      z[j] = x;
      dz[j] = g;
    }
    __syncthreads();
    // Single classes: few, possibly the same one twice, so one thread adds them in order.
    if (threadIdx.x == 0) {
      auto add = [&](i64 id, Acc g) {
        const i64 j = id - class0;
        if (j >= 0 && j < n && g != (Acc)0) dz[j] += g;
      };
      if (p.grad.target)
        for (int k = 0; k < p.targets.columns; k++) {
          const i64 id = p.targets.ids[row * p.targets.columns + k];
          if (!(p.targets.has_ignore && id == p.targets.ignore)) add(id, get(p.grad.target, row * p.targets.columns + k));
        }
      if (p.grad.max) add(p.saved.argmax[row], get(p.grad.max, row));
      if (p.grad.topk_values)
        for (int k = 0; k < p.topk; k++) add(p.saved.topk_ids[row * p.topk + k], get(p.grad.topk_values, row * p.topk + k));
    }
    __syncthreads();
    for (int j = threadIdx.x; j < n; j += kThreads) {
      Acc g = dz[j] * norm;
      if (p.softcap > 0. && g != (Acc)0) {
        const Acc ratio = z[j] * slope;
        g *= (Acc)1 - ratio * ratio;
      }
      out[at + j] = Element<T>::from(g);
      if (p.dots && g != (Acc)0) dot.value += (double)g * (double)from[at + j];
      // Sums over rows read it unrounded; this piece of z has been read.
      if (p.keep) ((Acc*)p.z)[(i64)slot * p.z_pitch + at + j] = g;
    }
  }
  for (int j = p.width + threadIdx.x; j < p.dx_pitch; j += kThreads) out[j] = Element<T>::from((Acc)0);
  if (!p.dots) return;
  __shared__ __align__(16) unsigned char scratch[kThreads / 32 * sizeof(double)];
  dot = block_merge(dot, scratch);
  if (threadIdx.x == 0) p.dots[slot] = (p.first ? 0. : p.dots[slot]) + dot.value;
}

}  // namespace

KERNEL(tile_statistics_f32, TileParams, kThreads) { tile_statistics<float>(p); }
KERNEL(tile_statistics_f64, TileParams, kThreads) { tile_statistics<double>(p); }
KERNEL(tile_gradient_bf16, TileParams, kThreads) { tile_gradient<float, bf16>(p); }
KERNEL(tile_gradient_f16, TileParams, kThreads) { tile_gradient<float, f16>(p); }
KERNEL(tile_gradient_f32, TileParams, kThreads) { tile_gradient<float, float>(p); }
KERNEL(tile_gradient_f64, TileParams, kThreads) { tile_gradient<double, double>(p); }

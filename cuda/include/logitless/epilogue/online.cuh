// online.cuh - statistics that need no reference: each class block carries its own maximum.
//
// Per row and class block (R: its classes other than the row's target; all: target included)
//   plane 0   max over R; -inf where R is empty or everything in it is -inf
//   plane 1   excess = sum over R, one maximum left out, of e^(z - max): 1 + excess is the block's
//             sum, and a peaked row keeps every digit of it
//   plane 2   moment = sum over R of (z - max) e^(z - max): kEntropy; without it, plane 1 is the
//             sum less 1
// and with kMoments
//   plane 3   sum over all of z
//   plane 4   sum over all of (z - block mean)^2
//   plane 5   max over all; nan wins
//   plane 6   its class (bits of an int), the lowest id among equals
// Blocks merge by statistics/rest.cuh, moments.cuh and maximum.cuh. The targets' own logits are by
// the way (GemmParams.target_z): a pass over their classes' rows of W would be 1% of the time.
//
// Two passes over the registers: the maximum, agreed upon by the quad of lanes that shares a row,
// then everything else, so that sums are plain additions. The squares are taken about the maximum
// and moved to the mean: the maximum is one of the n values, so at most a factor n of cancellation,
// 1e-5 relative.
//
// A maximum a block costs one instruction an element and is lost in the noise beside sums against a
// fixed reference, the target's logit (H200, D = 4096 / 2304 / 1024, sustained: 0.961 / 0.963 /
// 0.924 of E W^T by cuBLAS against 0.976 / 0.946 / 0.932), and it needs neither the reference nor a
// repair of rows that leave the range of a float.
//
// Straight-line code is what costs: past the instruction cache a version of one pass a statistic
// took 1.5 times the time of the product at D = 1024. So the passes share what they can, and the
// full set loops over fragments (fragments.cuh).
#pragma once
#include "logitless/epilogue/maps.cuh"

namespace logitless {

template <class Map, bool kEntropy, bool kMoments, bool kRepair = false>
struct OnlineEpilogue {
  static_assert(kEntropy || !kMoments, "the moments share the entropy's pass");
  static constexpr int kPanels = 0;
  static constexpr bool kGated = kRepair;
  static constexpr bool kSliced = false;
  static constexpr bool kRolled = kMoments;
  static constexpr bool kAhead = false;
  static constexpr int kNowhere = 1 << 30;

  // Lowest column of a row half with a nan, or kNowhere. Rare: only where a sum came out nan.
  template <int kColumns>
  static __device__ __forceinline__ int find_nan(const float (&z)[kColumns / 2], const Band& band,
                                                 const Exceptions& ex, int half) {
    int best = kNowhere;
#pragma unroll
    for (int i = kColumns / 2 - 1; i >= 0; i--)
      if (half_of(i) == half) best = z[i] != z[i] && ex.is_class(i) ? offset_of(i) : best;
    return ptx::quad_min(best + 2 * (band.lane & 3));
  }

  template <int kColumns, bool kCareful>
  static __device__ __forceinline__ void body(const float (&z)[kColumns / 2], const Band& band,
                                              const Exceptions& ex) {
    float top[2] = {-infinity(), -infinity()}, target[2] = {-infinity(), -infinity()};
#pragma unroll
    for (int i = 0; i < kColumns / 2; i++) {
      const int half = half_of(i);
      top[half] = fmaxf(top[half], kCareful && !ex.is_rest(i) ? -infinity() : z[i]);
      if (kCareful) target[half] = ex.is_target(i) ? z[i] : target[half];
    }
    if (kCareful && !kMoments && band.p.target_z) {  // beside the moments it spills 230 bytes
#pragma unroll
      for (int half = 0; half < 2; half++)
        if (ex.has_target(half)) band.p.target_z[band.my_row(half)] = target[half];
    }
    float offset[2], all[2], excess[2] = {0.f, 0.f}, moment[2] = {0.f, 0.f}, ties[2] = {0.f, 0.f},
                             sum[2] = {0.f, 0.f}, square[2] = {0.f, 0.f};
    int where[2] = {kNowhere, kNowhere};
#pragma unroll
    for (int half = 0; half < 2; half++) {
      top[half] = ptx::quad_max(top[half]);
      all[half] = kCareful && kMoments ? fmaxf(top[half], ptx::quad_max(target[half])) : top[half];
      offset[half] = fabsf(top[half]) == infinity() ? 0.f : -kLog2e * top[half];  // never inf - inf
    }
#pragma unroll
    for (int i = kColumns / 2 - 1; i >= 0; i--) {  // downwards: the last hit is the lowest class
      const int half = half_of(i);
      const float t = fmaf(z[i], kLog2e, offset[half]);
      const bool rest = !kCareful || ex.is_rest(i), exists = !kCareful || ex.is_class(i);
      const float e = rest ? ptx::exp2(t) : 0.f;
      if (!kEntropy) {
        excess[half] += e;
        continue;
      }
      const bool maximal = z[i] == top[half] && rest;
      ptx::add_either(maximal, ties[half], 1.f, excess[half], e);
      moment[half] = fmaf(e, fmaxf(t, -200.f), moment[half]);
      if (kMoments) {
        const bool hit = kCareful ? z[i] == all[half] && exists : maximal;
        where[half] = hit ? offset_of(i) : where[half];
        sum[half] += exists ? t : 0.f;
        square[half] = exists ? fmaf(t, t, square[half]) : square[half];
      }
    }
    const float n = static_cast<float>(min(kColumns, band.p.n - band.column));
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float rest = ptx::quad_sum(excess[half]);
      const float others =
          kEntropy ? rest + fmaxf(ptx::quad_sum(ties[half]) - 1.f, 0.f) : rest - 1.f;
      const bool empty = top[half] == -infinity() &&
                         others == others;  // nothing but -inf (a nan shows in the sum)
      band.emit(0, half, top[half]);
      band.emit(1, half, empty ? 0.f : others);
      if (kEntropy) {
        const float weighted = kLn2 * ptx::quad_sum(moment[half]);
        band.emit(2, half, empty ? 0.f : weighted);
      }
      if (kMoments) {
        const float origin = offset[half] == 0.f ? 0.f : top[half];
        const float total = kLn2 * ptx::quad_sum(sum[half]),
                    squares = kLn2 * kLn2 * ptx::quad_sum(square[half]);
        int column = ptx::quad_min(where[half] + 2 * (band.lane & 3));
        if (__any_sync(kFullWarp, total != total)) {  // a nan among the logits, or inf - inf
          const int nan = find_nan<kColumns>(z, band, ex, half);
          if (nan < kNowhere) {
            column = nan;
            all[half] = __int_as_float(0x7fffffff);
          }
        }
        band.emit(3, half, fmaf(n, origin, total));
        band.emit(4, half,
                  fmaxf(fmaf(-total, total / n, squares), 0.f) +
                      (total - total));  // fmaxf drops a nan: put it back
        band.emit(5, half, all[half]);
        band.emit(6, half,
                  __int_as_float(band.p.col0 + band.column + (column < kNowhere ? column : 0)));
      }
    }
  }

  template <int kColumns, class Store>
  static __device__ __forceinline__ void run(float (&acc)[kColumns / 2], const Band& band, Store&) {
    Map::template apply<kColumns, kMoments>(acc, band);  // the maximum's class is an output
    const float factor = Map::factor(band.p);
    if (factor != 1.f) {
#pragma unroll
      for (int i = 0; i < kColumns / 2; i++) acc[i] *= factor;
    }
    const Exceptions ex = Exceptions::find<kColumns>(band);
    if (ex.any) body<kColumns, true>(acc, band, ex);
    else body<kColumns, false>(acc, band, ex);
  }
};

}  // namespace logitless

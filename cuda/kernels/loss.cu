// loss.cu - cross entropy from what the engine keeps of a row, reduced, and its cotangents.
//
// With x = rest - target, the log of what the other classes weigh beside the target:
//   loss = log(1 + e^x), lse = loss + target, and z_loss * lse^2 where it is asked for;
//   d loss / d rest = 1 / (1 + e^-x) = -d loss / d target
// One launch each way: in a framework's own operations it is some twenty of 3 us, 2.5% of a
// training step at D = 768, V = 50257. A sum over rows is one block's, in double and in a fixed
// order.
//
// No shared memory but 48 doubles; 15 to 62 registers, no spills.
#include "logitless/common.cuh"

using namespace logitless;

namespace {

constexpr int kThreads = 1024;

template <class T>
__device__ __forceinline__ T exponential(T x);
template <>
__device__ __forceinline__ float exponential(float x) {
  return expf(x);
}
template <>
__device__ __forceinline__ double exponential(double x) {
  return exp(x);
}
template <class T>
__device__ __forceinline__ T log_of_one_plus(T x);
template <>
__device__ __forceinline__ float log_of_one_plus(float x) {
  return log1pf(x);
}
template <>
__device__ __forceinline__ double log_of_one_plus(double x) {
  return log1p(x);
}

template <class T>
struct Row {
  T x, target;

  __device__ __forceinline__ Row(const LossParams& p, i64 row)
      : Row(((const T*)p.rest)[row], ((const T*)p.target)[row]) {}
  __device__ __forceinline__ Row(T rest, T target) : x(rest - target), target(target) {
    // A logit of +inf: the softmax is inf / inf.
    if (rest == infinite<T>() || target == infinite<T>()) x = not_a_number<T>();
  }
  __device__ __forceinline__ T cross_entropy() const {
    return x > T(40) ? x : log_of_one_plus(exponential(x));
  }
  __device__ __forceinline__ T loss(const LossParams& p) const {
    const T plain = cross_entropy();
    if (p.z_loss == 0.) return plain;
    const T lse = plain + target;
    return plain + T(p.z_loss) * lse * lse;
  }
};

__device__ __forceinline__ bool kept(const LossParams& p, i64 row) {
  return p.ids[row] != p.ignore;
}

// A thread a row.
template <class T>
__device__ __forceinline__ void each_row(const LossParams& p) {
  const i64 row = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (row < p.rows) ((T*)p.loss)[row] = kept(p, row) ? Row<T>(p, row).loss(p) : T(0);
}

// One block: the sum or the mean, and what the backward multiplies by.
template <class T>
__device__ __forceinline__ void total(const LossParams& p) {
  __shared__ double warp_total[kThreads / 32];
  __shared__ int warp_count[kThreads / 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  double sum = 0.;
  int count = 0;
  struct Loaded {
    T rest, target;
    bool kept;
  };
  auto load = [&](int row) {
    return Loaded{((const T*)p.rest)[row], ((const T*)p.target)[row], kept(p, row)};
  };
  // Few registers, for a block of 1024 threads, hold 8 rows of float and 4 of double.
  in_batches<32 / sizeof(T)>(threadIdx.x, kThreads, (int)p.rows, load, [&](int, const Loaded& row) {
    if (!row.kept) return;
    sum += (double)Row<T>(row.rest, row.target).loss(p);
    count++;
  });
  sum = warp_sum(sum);
  count = warp_sum(count);
  if (lane == 0) {
    warp_total[warp] = sum;
    warp_count[warp] = count;
  }
  __syncthreads();  // the first warp reads what every warp wrote
  if (warp) return;
  sum = warp_sum(warp_total[lane]);
  count = warp_sum(warp_count[lane]);
  if (lane) return;
  const double divisor = p.mean ? (double)count : 1.;
  *(T*)p.loss = (T)(sum / divisor);  // 0 / 0 where no row is kept, as torch has it
  *(T*)p.share = (T)(1. / divisor);
}

template <class T>
__device__ __forceinline__ void slopes(const LossParams& p) {
  const i64 row = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= p.rows) return;
  T rest = 0, target = 0;
  if (kept(p, row)) {
    const Row<T> r(p, row);
    const T g =
        p.per_row ? ((const T*)p.gradient)[row] : *(const T*)p.gradient * *(const T*)p.share;
    const T others = T(1) / (T(1) + exponential(-r.x));  // their probability
    rest = g * others;
    target = -rest;
    if (p.z_loss != 0.) {
      const T twice = g * T(2. * p.z_loss) * (r.cross_entropy() + r.target);
      rest += twice * others;
      target += twice * (T(1) / (T(1) + exponential(r.x)));
    }
  }
  ((T*)p.g_rest)[row] = rest;
  ((T*)p.g_target)[row] = target;
}

}  // namespace

KERNEL(loss_rows_f32, LossParams, 256) { each_row<float>(p); }
KERNEL(loss_rows_f64, LossParams, 256) { each_row<double>(p); }
KERNEL(loss_total_f32, LossParams, kThreads) { total<float>(p); }
KERNEL(loss_total_f64, LossParams, kThreads) { total<double>(p); }
KERNEL(loss_slopes_f32, LossParams, 256) { slopes<float>(p); }
KERNEL(loss_slopes_f64, LossParams, 256) { slopes<double>(p); }

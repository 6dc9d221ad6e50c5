//! The register tile on x86: AVX-512 (f32, f64, bf16 pairs by `vdpbf16ps`) and AVX2 with FMA (f32, f64).
//!
//! | tile | registers of C, of B | flops an instruction | measured, Zen 5, one core (peak) | torch 2.15 `mm` |
//! |---|---|---|---|---|
//! | AVX-512 f32, 14 x 32 | 28 zmm, 2 | 32 | 228 GF/s (231) | 77 |
//! | AVX-512 bf16 pairs, 14 x 32 | 28 zmm, 2 | 64 | 452 GF/s (462) | 308 |
//! | AVX-512 f64, 7 x 32 | 28 zmm, 4 | 16 | 100 GF/s (116) | |
//! | AVX2 f32, 6 x 16: half a panel | 12 ymm, 2 | 16 | 113 GF/s (116) | |
//! | AVX2 f64, 6 x 8: a quarter | 12 ymm, 2 | 8 | 51 GF/s (58) | |
//! | SSE2 f32, 6 x 8; f64, 6 x 4 | 12 xmm, 2 | 8, 4 (two) | 34; 11 GF/s | |
//!
//! (`z = W Eᵀ` at N=1024, D=512, blocks of 126 classes. MKL keeps to 256 bits on AMD.)
//!
//! Loads and stores are all of the unaligned kind, which costs nothing on aligned addresses: packed B and
//! private C are 64-byte aligned, rows of A read in place need not be.
use super::tile::{Simd, tile, unit};
use super::{LANES, Product};
use core::arch::x86_64::*;
use half::bf16;

/// Implements [`Simd`] for a register of plain floats.
macro_rules! simd {
    ($(#[$doc:meta])* $name:ident($register:ty) = $width:literal x $element:ty:
     $zero:ident $load:ident $set1:ident $fmadd:ident $add:ident $store:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy)]
        pub(crate) struct $name($register);

        // SAFETY: each method is one instruction of the set that the type's documentation names, on
        // exactly WIDTH lanes.
        unsafe impl Simd for $name {
            type Element = $element;
            type Acc = $element;
            type Operand = $register;
            const WIDTH: usize = $width;
            const GROUP: usize = 1;

            #[inline(always)]
            unsafe fn zero() -> Self {
                // SAFETY: the trait's contract.
                unsafe { Self($zero()) }
            }
            #[inline(always)]
            unsafe fn operands(b: *const $element) -> $register {
                // SAFETY: the trait's contract.
                unsafe { $load(b) }
            }
            #[inline(always)]
            unsafe fn splat(a: *const $element) -> $register {
                // SAFETY: the trait's contract.
                unsafe { $set1(a.read_unaligned()) }
            }
            #[inline(always)]
            unsafe fn mul_add(self, a: $register, b: $register) -> Self {
                // SAFETY: the trait's contract.
                unsafe { Self($fmadd(a, b, self.0)) }
            }
            #[inline(always)]
            unsafe fn add(self, other: Self) -> Self {
                // SAFETY: the trait's contract.
                unsafe { Self($add(self.0, other.0)) }
            }
            #[inline(always)]
            unsafe fn load(c: *const $element) -> Self {
                // SAFETY: the trait's contract.
                unsafe { Self($load(c)) }
            }
            #[inline(always)]
            unsafe fn store(self, c: *mut $element) {
                // SAFETY: the trait's contract.
                unsafe { $store(c, self.0) }
            }
            #[inline(always)]
            unsafe fn prefetch(p: *const $element) {
                // SAFETY: a prefetch never faults.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
            }
        }
    };
}

simd!(
    /// 16 f32 of AVX-512F.
    F32x16(__m512) = 16 x f32: _mm512_setzero_ps _mm512_loadu_ps _mm512_set1_ps _mm512_fmadd_ps _mm512_add_ps _mm512_storeu_ps
);
simd!(
    /// 8 f64 of AVX-512F.
    F64x8(__m512d) = 8 x f64: _mm512_setzero_pd _mm512_loadu_pd _mm512_set1_pd _mm512_fmadd_pd _mm512_add_pd _mm512_storeu_pd
);
simd!(
    /// 8 f32 of AVX2 and FMA.
    F32x8(__m256) = 8 x f32: _mm256_setzero_ps _mm256_loadu_ps _mm256_set1_ps _mm256_fmadd_ps _mm256_add_ps _mm256_storeu_ps
);
simd!(
    /// 4 f64 of AVX2 and FMA.
    F64x4(__m256d) = 4 x f64: _mm256_setzero_pd _mm256_loadu_pd _mm256_set1_pd _mm256_fmadd_pd _mm256_add_pd _mm256_storeu_pd
);

simd!(
    /// 4 f32 of SSE2, which every x86-64 has; multiply and add round separately.
    F32x4(__m128) = 4 x f32: _mm_setzero_ps _mm_loadu_ps _mm_set1_ps mul_add_ps _mm_add_ps _mm_storeu_ps
);
simd!(
    /// 2 f64 of SSE2.
    F64x2(__m128d) = 2 x f64: _mm_setzero_pd _mm_loadu_pd _mm_set1_pd mul_add_pd _mm_add_pd _mm_storeu_pd
);

/// Safe wherever SSE2 is, that is everywhere; `unsafe` like the fused intrinsics that it stands in for.
#[inline(always)]
unsafe fn mul_add_ps(a: __m128, b: __m128, c: __m128) -> __m128 {
    // SAFETY: SSE2 is part of x86-64.
    unsafe { _mm_add_ps(_mm_mul_ps(a, b), c) }
}

/// Safe wherever SSE2 is, that is everywhere; `unsafe` like the fused intrinsics that it stands in for.
#[inline(always)]
unsafe fn mul_add_pd(a: __m128d, b: __m128d, c: __m128d) -> __m128d {
    // SAFETY: SSE2 is part of x86-64.
    unsafe { _mm_add_pd(_mm_mul_pd(a, b), c) }
}

/// 16 f32 of AVX512-BF16, fed by pairs of bf16.
///
/// `vdpbf16ps` adds the product of the odd elements, then that of the even ones, rounding to nearest
/// each time; it takes subnormal operands and results as zero and raises no exception.
#[derive(Clone, Copy)]
pub(crate) struct Bf16x32(__m512);

// SAFETY: each method is one instruction of AVX-512F or AVX512-BF16 on exactly WIDTH lanes.
unsafe impl Simd for Bf16x32 {
    type Element = bf16;
    type Acc = f32;
    type Operand = __m512bh;
    const WIDTH: usize = 16;
    const GROUP: usize = 2;

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the trait's contract.
        unsafe { Self(_mm512_setzero_ps()) }
    }
    #[inline(always)]
    unsafe fn operands(b: *const bf16) -> __m512bh {
        // SAFETY: the trait's contract; `__m512bh` is 64 bytes of any content.
        unsafe { b.cast::<__m512bh>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn splat(a: *const bf16) -> __m512bh {
        // SAFETY: the trait's contract; both types are 64 bytes of any content.
        unsafe {
            let pair = a.cast::<i32>().read_unaligned();
            core::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(pair))
        }
    }
    #[inline(always)]
    unsafe fn mul_add(self, a: __m512bh, b: __m512bh) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Self(_mm512_dpbf16_ps(self.0, a, b)) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Self(_mm512_add_ps(self.0, other.0)) }
    }
    #[inline(always)]
    unsafe fn load(c: *const f32) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Self(_mm512_loadu_ps(c)) }
    }
    #[inline(always)]
    unsafe fn store(self, c: *mut f32) {
        // SAFETY: the trait's contract.
        unsafe { _mm512_storeu_ps(c, self.0) }
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const bf16) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
}

/// Defines `$name`, one product by register tiles of `$simd`, at most `$most` rows and exactly `$cols`
/// registers each. Rows are cut evenly, so that no tile is too low to hide the latency of its multiplies.
macro_rules! product {
    ($(#[$doc:meta])* $name:ident, $wrapper:ident: $features:literal,
     $simd:ty, $cols:literal registers, $most:literal rows ($($m:literal)*)) => {
        #[target_feature(enable = $features)]
        unsafe fn $wrapper<const M: usize, const UNIT: u8>(
            p: &Product<<$simd as Simd>::Element, <$simd as Simd>::Acc>,
            row: usize,
            column: usize,
        ) {
            // SAFETY: the contract of `tile`; this function brings the instruction set.
            unsafe { tile::<$simd, M, $cols, UNIT>(p, row, column) }
        }

        $(#[$doc])*
        ///
        /// # Safety
        /// The pointers of `p` are valid for everything that it spans, C overlaps neither operand, and the
        /// instruction set is present.
        pub(crate) unsafe fn $name(p: &Product<<$simd as Simd>::Element, <$simd as Simd>::Acc>) {
            debug_assert!(p.a_k == 1 || (p.a_row == 1 && <$simd as Simd>::GROUP == 1));
            debug_assert!(p.k.is_multiple_of(<$simd as Simd>::GROUP) && p.c_row >= LANES);
            let tiles = p.m.div_ceil($most);
            for column in (0..LANES).step_by($cols * <$simd as Simd>::WIDTH) {
                let mut row = 0;
                for t in 0..tiles {
                    let next = p.m * (t + 1) / tiles;
                    // SAFETY: rows and columns lie inside the product, whose extents the caller vouches for.
                    unsafe {
                        match (next - row, p.a_k) {
                            $(($m, 1) => $wrapper::<$m, { unit::K }>(p, row, column),
                            ($m, _) => $wrapper::<$m, { unit::ROW }>(p, row, column),)*
                            _ => unreachable!("a register tile has at most {} rows", $most),
                        }
                    }
                    row = next;
                }
            }
        }
    };
}

product!(
    /// f32 on AVX-512.
    avx512_f32, avx512_f32_tile: "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma",
    F32x16, 2 registers, 14 rows (1 2 3 4 5 6 7 8 9 10 11 12 13 14)
);
product!(
    /// f64 on AVX-512.
    avx512_f64, avx512_f64_tile: "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma",
    F64x8, 4 registers, 7 rows (1 2 3 4 5 6 7)
);
product!(
    /// Pairs of bf16 on AVX512-BF16.
    avx512_bf16, avx512_bf16_tile: "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma",
    Bf16x32, 2 registers, 14 rows (1 2 3 4 5 6 7 8 9 10 11 12 13 14)
);
product!(
    /// f32 on AVX2.
    avx2_f32, avx2_f32_tile: "avx2,fma",
    F32x8, 2 registers, 6 rows (1 2 3 4 5 6)
);
product!(
    /// f64 on AVX2.
    avx2_f64, avx2_f64_tile: "avx2,fma",
    F64x4, 2 registers, 6 rows (1 2 3 4 5 6)
);
product!(
    /// f32 on SSE2.
    sse2_f32, sse2_f32_tile: "sse2", F32x4, 2 registers, 6 rows (1 2 3 4 5 6)
);
product!(
    /// f64 on SSE2.
    sse2_f64, sse2_f64_tile: "sse2", F64x2, 2 registers, 6 rows (1 2 3 4 5 6)
);

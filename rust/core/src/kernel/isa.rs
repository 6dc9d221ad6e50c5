//! Levels of vector instructions, as types.
//!
//! A loop is written once over plain arrays of lanes, and LLVM vectorises it inside a
//! `#[target_feature]` wrapper: [`Isa::vectorize`] is that wrapper.

use super::Product;
#[cfg(not(target_arch = "x86_64"))]
use super::portable::{product_f32 as baseline_f32, product_f64 as baseline_f64};
#[cfg(target_arch = "x86_64")]
use super::x86::{sse2_f32 as baseline_f32, sse2_f64 as baseline_f64};

/// Whether every machine of this target fuses multiply and add: aarch64 does, x86-64 need not.
pub(crate) const BASELINE_FUSES: bool = cfg!(target_arch = "aarch64");

/// A loop nest that is compiled once for every level.
pub(crate) trait Vectorize {
    /// What it returns.
    type Output;
    /// The body; implementations are `#[inline(always)]`, so that it takes on the level's features.
    fn run<const FMA: bool>(self) -> Self::Output;
}

/// One level.
///
/// # Safety
/// An instance must exist only where its instructions were detected.
pub(crate) unsafe trait Isa: Copy + Send + Sync + 'static {
    /// Runs `work` compiled for this level.
    fn vectorize<V: Vectorize>(self, work: V) -> V::Output;

    /// The f32 multiplier.
    ///
    /// # Safety
    /// As for [`super::Kernel::product`]; the level was detected.
    unsafe fn product_f32(p: &Product<f32, f32>);

    /// The f64 multiplier.
    ///
    /// # Safety
    /// As for [`super::Kernel::product`]; the level was detected.
    unsafe fn product_f64(p: &Product<f64, f64>);
}

/// What every machine has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Portable;

// SAFETY: uses no instruction beyond the target's baseline.
unsafe impl Isa for Portable {
    #[inline]
    fn vectorize<V: Vectorize>(self, work: V) -> V::Output {
        work.run::<BASELINE_FUSES>()
    }
    unsafe fn product_f32(p: &Product<f32, f32>) {
        // SAFETY: the caller's promise is the same.
        unsafe { baseline_f32(p) }
    }
    unsafe fn product_f64(p: &Product<f64, f64>) {
        // SAFETY: the caller's promise is the same.
        unsafe { baseline_f64(p) }
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Isa, Product, Vectorize};
    use crate::kernel::x86;

    macro_rules! level {
        ($(#[$doc:meta])* $name:ident, $features:literal, $product_f32:ident, $product_f64:ident) => {
            $(#[$doc])*
            #[derive(Clone, Copy, Debug)]
            pub(crate) struct $name(());

            impl $name {
                /// The level, where the processor has it.
                pub(crate) fn detect() -> Option<Self> {
                    Self::detected().then_some(Self(()))
                }
            }

            // SAFETY: `detect` is the only constructor.
            unsafe impl Isa for $name {
                #[inline]
                fn vectorize<V: Vectorize>(self, work: V) -> V::Output {
                    #[target_feature(enable = $features)]
                    fn inside<V: Vectorize>(work: V) -> V::Output {
                        work.run::<true>()
                    }
                    // SAFETY: an instance exists only where the features were detected.
                    unsafe { inside(work) }
                }
                #[inline]
                unsafe fn product_f32(p: &Product<f32, f32>) {
                    // SAFETY: the level was detected, and the caller vouches for the operands.
                    unsafe { x86::$product_f32(p) }
                }
                #[inline]
                unsafe fn product_f64(p: &Product<f64, f64>) {
                    // SAFETY: the level was detected, and the caller vouches for the operands.
                    unsafe { x86::$product_f64(p) }
                }
            }
        };
    }

    level!(
        /// 256-bit vectors with fused multiply-add.
        Avx2, "avx2,fma,f16c", avx2_f32, avx2_f64
    );
    level!(
        /// 512-bit vectors.
        Avx512, "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c", avx512_f32, avx512_f64
    );

    impl Avx2 {
        fn detected() -> bool {
            is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
        }
    }

    impl Avx512 {
        fn detected() -> bool {
            Avx2::detected()
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
        }
    }
}

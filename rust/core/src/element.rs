//! The numbers: what tensors hold ([`Element`]) and what the engine computes in ([`Real`]).

use crate::kernel::{Isa, Product, convert};
use half::{bf16, f16};
use std::fmt::Debug;
use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub};

/// Element type of a tensor. The discriminants are the codes that cross the Python boundary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum DType {
    /// IEEE single precision.
    F32 = 0,
    /// IEEE double precision.
    F64 = 1,
    /// The upper half of a single.
    Bf16 = 2,
    /// IEEE half precision.
    F16 = 3,
    /// Signed 64-bit integers: class ids.
    I64 = 4,
    /// Bytes: the store that a forward hands to its backward.
    U8 = 5,
}

impl DType {
    /// The type with this code, if there is one.
    pub fn from_code(code: u8) -> Option<Self> {
        [Self::F32, Self::F64, Self::Bf16, Self::F16, Self::I64, Self::U8]
            .into_iter()
            .find(|&dtype| dtype as u8 == code)
    }

    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
            Self::U8 => 1,
        }
    }

    /// Whether it is one of the four float types.
    pub fn is_float(self) -> bool {
        !matches!(self, Self::I64 | Self::U8)
    }

    /// The type that statistics and accumulators of an input of this type have.
    pub fn accumulator(self) -> Self {
        if self == Self::F64 { Self::F64 } else { Self::F32 }
    }

    /// Its name, as NumPy and torch spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F64 => "float64",
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
            Self::I64 => "int64",
            Self::U8 => "uint8",
        }
    }
}

/// A float that tensors may hold.
pub(crate) trait Element: Copy + Default + Send + Sync + Debug + 'static {
    /// Its tag.
    const DTYPE: DType;
    /// What sums of it are kept in.
    type Acc: Real;
    /// Exact.
    fn widen(self) -> Self::Acc;
    /// Rounds to nearest, ties to even.
    fn narrow(value: Self::Acc) -> Self;
}

macro_rules! element {
    ($type:ty, $dtype:ident, $acc:ty, $widen:expr, $narrow:expr) => {
        impl Element for $type {
            const DTYPE: DType = DType::$dtype;
            type Acc = $acc;
            #[inline(always)]
            fn widen(self) -> $acc {
                $widen(self)
            }
            #[inline(always)]
            fn narrow(value: $acc) -> Self {
                $narrow(value)
            }
        }
    };
}
element!(f32, F32, f32, |x| x, |x| x);
element!(f64, F64, f64, |x| x, |x| x);
element!(bf16, Bf16, f32, bf16::to_f32, convert::f32_to_bf16);
element!(f16, F16, f32, convert::f16_to_f32, convert::f32_to_f16);

/// A float that the engine computes in: f32, or f64 for f64 inputs.
///
/// Everything here is branch-free on finite and non-finite values alike, so that loops over lanes
/// vectorise. `FMA` says whether the enclosing function has fused multiply-add.
pub(crate) trait Real:
    Element<Acc = Self>
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + MulAssign
{
    const ZERO: Self;
    const ONE: Self;
    const NEG_INFINITY: Self;
    /// The most negative finite number: the start of a maximum, so that −inf − max stays −inf.
    const LOWEST: Self;

    fn from_f64(value: f64) -> Self;
    fn to_f64(self) -> f64;

    /// `self · b + c`, with one rounding where `FMA` holds.
    fn mul_add<const FMA: bool>(self, b: Self, c: Self) -> Self;

    /// Whether it is nan.
    #[inline(always)]
    #[allow(clippy::eq_op)]
    fn is_nan(self) -> bool {
        self != self
    }

    /// eˣ for x ≤ 88 (f32) or x ≤ 708 (f64), to about 1 ulp; 0 where the result would be
    /// subnormal; nan for nan.
    fn exp<const FMA: bool>(self) -> Self;

    /// Hyperbolic tangent, to about 2 ulp; nan for nan.
    fn tanh<const FMA: bool>(self) -> Self;

    /// The product kernel of this type at level `I`.
    ///
    /// # Safety
    /// As for [`crate::kernel::Kernel::product`]; the level was detected.
    unsafe fn product<I: Isa>(p: &Product<Self, Self>);
}

/// `Σ coefficients[i] · xⁿ⁻ⁱ` by Horner's rule.
#[inline(always)]
fn horner<A: Real, const FMA: bool, const N: usize>(x: A, coefficients: [f64; N]) -> A {
    let mut sum = A::from_f64(coefficients[0]);
    for &coefficient in &coefficients[1..] {
        sum = sum.mul_add::<FMA>(x, A::from_f64(coefficient));
    }
    sum
}

/// Odd function: the value for |x|, with the sign of x.
#[inline(always)]
fn tanh_of<A: Real, const FMA: bool>(x: A, small: A, limit: f64) -> A {
    // Beyond 0.625 nothing cancels in 1 − 2/(e²ˣ + 1); `limit` is where it has become 1.
    let magnitude = if x < A::ZERO { -x } else { x };
    let bounded = if magnitude > A::from_f64(limit) { A::from_f64(limit) } else { magnitude };
    let two = A::from_f64(2.0);
    let large = A::ONE - two / ((bounded * two).exp::<FMA>() + A::ONE);
    let large = if x < A::ZERO { -large } else { large };
    if magnitude < A::from_f64(0.625) { small } else { large }
}

macro_rules! real {
    ($type:ident, $product:ident, $bits:ident, $shift:literal, $bias:expr,
     low: $low:literal, magic: $magic:literal, ln2: $ln2_high:literal $ln2_low:literal,
     exp: $exp:expr, tanh: $tanh:expr, limit: $limit:literal) => {
        // Coefficients keep the digits that they were published with.
        #[allow(clippy::excessive_precision)]
        impl Real for $type {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            const NEG_INFINITY: Self = $type::NEG_INFINITY;
            const LOWEST: Self = $type::MIN;

            #[inline(always)]
            fn from_f64(value: f64) -> Self {
                value as $type
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                self as f64
            }
            #[inline(always)]
            fn mul_add<const FMA: bool>(self, b: Self, c: Self) -> Self {
                if FMA { $type::mul_add(self, b, c) } else { self * b + c }
            }
            #[inline(always)]
            fn exp<const FMA: bool>(self) -> Self {
                // Comparisons with nan are false, so nan passes both selects and the arithmetic.
                let x = if self < $low { $low } else { self };
                // Adding 1.5 · 2^(mantissa bits) rounds to an integer and leaves it in the low bits.
                let shifted = Real::mul_add::<FMA>(x, std::$type::consts::LOG2_E, $magic);
                let n = shifted - $magic;
                let r = Real::mul_add::<FMA>(n, -$ln2_high, x);
                let r = Real::mul_add::<FMA>(n, -$ln2_low, r);
                let tail: $type = horner::<$type, FMA, _>(r, $exp);
                let e = Real::mul_add::<FMA>(tail * r, r, r) + 1.0;
                let power =
                    $type::from_bits((shifted.to_bits() << $shift).wrapping_add($bias << $shift));
                if self < $low { 0.0 } else { e * power }
            }
            #[inline(always)]
            fn tanh<const FMA: bool>(self) -> Self {
                let square = self * self;
                let small: fn($type) -> $type = $tanh;
                tanh_of::<$type, FMA>(
                    self,
                    Real::mul_add::<FMA>(self * square, small(square), self),
                    $limit,
                )
            }
            #[inline(always)]
            unsafe fn product<I: Isa>(p: &Product<Self, Self>) {
                // SAFETY: the caller's promise is the same.
                unsafe { I::$product(p) }
            }
        }
    };
}

// Polynomials: Cephes' expf, tanhf and tanh; Taylor to order 13 for the double exponential
// (|r| <= ln 2 / 2, remainder 4e-18). The tail of the exponential is (eʳ − 1 − r) / r².
real!(f32, product_f32, u32, 23, 127,
    low: -87.336_54, magic: 12_582_912.0, ln2: 0.693_359_375 -2.121_944_4e-4,
    exp: [1.987_569_15e-4, 1.398_199_95e-3, 8.333_451_9e-3, 4.166_579_59e-2, 1.666_666_55e-1, 5.000_000_12e-1],
    tanh: |s| horner::<f32, false, _>(s, [-5.704_988_73e-3, 2.063_908_88e-2, -5.373_971_56e-2, 1.333_144_22e-1, -3.333_328_19e-1]),
    limit: 10.0);
real!(f64, product_f64, u64, 52, 1023,
    low: -708.396, magic: 6_755_399_441_055_744.0, ln2: 6.931_457_519_531_25e-1 1.428_606_820_309_417_232e-6,
    exp: [1.0 / 6_227_020_800.0, 1.0 / 479_001_600.0, 1.0 / 39_916_800.0, 1.0 / 3_628_800.0, 1.0 / 362_880.0,
        1.0 / 40_320.0, 1.0 / 5_040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5],
    tanh: |s| horner::<f64, false, _>(s, [-9.643_991_794_250_522_386e-1, -9.928_772_310_019_185_866e1, -1.614_687_684_417_084_479e3])
        / horner::<f64, false, _>(s, [1.0, 1.128_116_784_916_329_314e2, 2.235_488_390_601_004_486e3, 4.844_063_053_251_254_86e3]),
    limit: 22.0);

#[cfg(test)]
mod tests {
    use super::Real;

    /// Largest |found − right| / |right|, over floats of both signs spread evenly by their bits.
    fn worst(limit: f32, found: impl Fn(f32) -> f64, right: impl Fn(f64) -> f64) -> f64 {
        (1e-6_f32.to_bits()..limit.to_bits())
            .step_by(61)
            .map(f32::from_bits)
            .flat_map(|x| [x, -x])
            .map(|x| ((found(x) - right(f64::from(x))) / right(f64::from(x))).abs())
            .fold(0.0, f64::max)
    }

    #[test]
    fn exponentials_are_right_to_about_an_ulp() {
        let single = f64::from(f32::EPSILON);
        assert!(worst(87.0, |x| f64::from(Real::exp::<true>(x)), f64::exp) < single);
        assert!(worst(87.0, |x| f64::from(Real::exp::<false>(x)), f64::exp) < single);
        // Twice the unit: the reference rounds too.
        let wide = |x| Real::exp::<true>(f64::from(x));
        assert!(worst(700.0, wide, f64::exp) < 2.0 * f64::EPSILON);
    }

    #[test]
    fn tangents_are_right_to_two_ulps() {
        let single = f64::from(f32::EPSILON);
        assert!(worst(40.0, |x| f64::from(Real::tanh::<true>(x)), f64::tanh) < 2.0 * single);
        assert!(worst(40.0, |x| f64::from(Real::tanh::<false>(x)), f64::tanh) < 2.0 * single);
        let wide = |x| Real::tanh::<true>(f64::from(x));
        assert!(worst(40.0, wide, f64::tanh) < 4.0 * f64::EPSILON);
    }

    #[test]
    fn what_is_not_finite_stays_so() {
        assert!(Real::exp::<true>(f32::NAN).is_nan() && Real::tanh::<true>(f64::NAN).is_nan());
        assert_eq!(Real::exp::<true>(f32::NEG_INFINITY), 0.0);
        assert_eq!(Real::exp::<true>(-750.0_f64), 0.0);
        assert_eq!(Real::tanh::<true>(f32::INFINITY), 1.0);
        assert_eq!(Real::tanh::<true>(f64::NEG_INFINITY), -1.0);
    }
}

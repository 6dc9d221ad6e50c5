//! The logit maps: x = logit_scale · u + bias, z = softcap · tanh(x / softcap), for u = E Wᵀ.

use crate::element::Real;
use crate::kernel::LANES;

/// The maps of a call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Maps<A> {
    scale: A,
    /// 0: none.
    softcap: A,
    inverse: A,
}

impl<A: Real> Maps<A> {
    /// Maps with these parameters; a softcap of 0 means none.
    pub(crate) fn new(scale: f64, softcap: f64) -> Self {
        let inverse = if softcap == 0.0 { 0.0 } else { 1.0 / softcap };
        Self {
            scale: A::from_f64(scale),
            softcap: A::from_f64(softcap),
            inverse: A::from_f64(inverse),
        }
    }

    /// Turns products u into logits z. `bias` holds one number for each class of the tile, or none.
    #[inline(always)]
    pub(crate) fn apply<const FMA: bool>(&self, tile: &mut [[A; LANES]], bias: &[A]) {
        if self.scale != A::ONE || !bias.is_empty() {
            for (class, tile) in tile.iter_mut().enumerate() {
                let bias = if bias.is_empty() { A::ZERO } else { bias[class] };
                for z in tile {
                    *z = self.scale.mul_add::<FMA>(*z, bias);
                }
            }
        }
        if self.softcap != A::ZERO {
            for tile in tile {
                for z in tile {
                    *z = (*z * self.inverse).tanh::<FMA>() * self.softcap;
                }
            }
        }
    }

    /// dz/dx at a logit z.
    #[inline(always)]
    pub(crate) fn slope(&self, z: A) -> A {
        let y = z * self.inverse;
        A::ONE - y * y
    }

    /// Whether there is a softcap.
    pub(crate) fn is_capped(&self) -> bool {
        self.softcap != A::ZERO
    }

    /// The logit scale, which multiplies the gradients of input and weight.
    pub(crate) fn scale(&self) -> A {
        self.scale
    }
}

//! Which classes' exponentials a forward keeps for its backward, and in whose memory.
//!
//! A class that is kept costs three products (and, for an entropy's gradient, a pass over its
//! exponentials), one that is not costs four. H200, N = 8192, lean's forward and backward to the three
//! cuBLAS products, sustained, without and with what is kept: 1.35 and 1.18 (D = 4096, V = 128256),
//! 1.38 and 1.28 (1024, 65536), 1.35 and 1.19 (3072, 32064), 1.37 and 1.24 (768, 50257).
//!
//! Kept classes are cut into chunks, each a matrix X of (padded rows, width), in two strips:
//!
//! ```text
//! classes   0 ........ lent ........ own ................... V
//!           chunks at the end        chunks in    made again in the backward,
//!           of dW's memory           the store    tile by tile
//! ```
//!
//! *Lent*: the gradient of the weight needs V rows of memory that the forward has no use for. Its last
//! bytes hold the first chunks. The backward takes them in ascending order: chunk k becomes rows of dW
//! at the front while it and all later ones lie behind those rows. With R elements of exponentials'
//! size a row of dW, n chunks of w classes and N rows, chunk k is safe if
//! `(k + 1) w R <= V R - n w N + k w N`; that is linear in k, so `w <= V R / max(R + n N, n R + N)`.
//!
//! *Own*: the store. Where the backward may overwrite it, its memory is that of the gradient tiles,
//! which are not needed before the kept classes are done with.

use crate::driver::Facts;
use crate::layout::{Geometry, padded};
use crate::product::{Operation, choose};
use crate::widths::{backward_cost, even_width, products_cost};

/// Bytes of an exponential: bf16.
const SIZE: usize = 2;

/// Most chunks that the weight's gradient is asked to lend: beyond, their launches cost what they save.
const MOST_CHUNKS: usize = 16;

/// Widest chunk of a store that is overwritten.
pub(crate) const WIDEST: usize = 33_792;

/// What a forward may count on from its backward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lends {
    /// The store must stay as it is: the backward may run again, or is a function of it.
    #[default]
    Nothing,
    /// The backward that reads the store is the last one, and may overwrite it.
    Store,
    /// The same, and the gradient of the weight exists from the forward on: a contiguous (V, D)
    /// tensor with elements of this many bytes.
    Weight(usize),
}

/// What is known of the memory of the gradients when a plan is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outputs {
    /// Rows of the input's gradient follow one another: it can hold the packed input meanwhile.
    pub compact: bool,
    /// What the forward may use.
    pub lends: Lends,
}

impl Default for Outputs {
    fn default() -> Outputs {
        Outputs { compact: true, lends: Lends::Nothing }
    }
}

/// Neighbouring classes in chunks of one width; the last may be narrower.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Strip {
    pub first: usize,
    pub classes: usize,
    pub width: usize,
}

impl Strip {
    fn chunks(&self) -> usize {
        self.classes.div_ceil(self.width.max(1))
    }
}

/// The classes whose exponentials are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Share {
    pub lent: Strip,
    pub own: Strip,
    /// Width of the tiles of the other classes, where they take the store's place.
    pub tile: usize,
    pub lends: Lends,
}

/// Where a chunk of exponentials begins, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Of the gradient of the weight.
    Lent(usize),
    /// Of the exponentials in the store.
    Own(usize),
}

/// A chunk of kept classes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub first: usize,
    pub count: usize,
    /// Elements from one row to the next.
    pub width: usize,
    pub place: Place,
}

impl Share {
    /// Classes kept: the first ones.
    pub fn classes(&self) -> usize {
        self.lent.classes + self.own.classes
    }

    /// Whether the tiles of the backward take the place of the store.
    pub fn overwrites(&self) -> bool {
        self.classes() > 0 && self.lends != Lends::Nothing
    }

    /// Bytes of exponentials in the store, or of the tiles that take their place.
    pub fn own_bytes(&self, rows: usize) -> usize {
        (self.own.chunks() * self.own.width).max(self.tile) * padded(rows) * SIZE
    }

    /// Bytes of exponentials in the gradient of the weight.
    pub fn lent_bytes(&self, rows: usize) -> usize {
        self.lent.chunks() * self.lent.width * padded(rows) * SIZE
    }

    /// The chunks in the order of the backward; `lender` counts the bytes of the weight's gradient.
    pub fn pieces(&self, rows: usize, lender: usize) -> impl Iterator<Item = Piece> {
        let step = move |strip: Strip| strip.width * padded(rows) * SIZE;
        let start = (lender / 256 * 256).saturating_sub(self.lent_bytes(rows));
        let (lent, own) = (self.lent, self.own);
        let cut = |strip: Strip| {
            (0..strip.chunks()).map(move |k| {
                let before = k * strip.width;
                (k, strip.first + before, strip.width.min(strip.classes - before))
            })
        };
        let lent_pieces = cut(lent).map(move |(k, first, count)| Piece {
            first,
            count,
            width: lent.width,
            place: Place::Lent(start + k * step(lent)),
        });
        lent_pieces.chain(cut(own).map(move |(k, first, count)| Piece {
            first,
            count,
            width: own.width,
            place: Place::Own(k * step(own)),
        }))
    }
}

/// Classes a chunk of `chunks` in the gradient of the weight (see the top), in steps of 64.
fn lent_width(rows: usize, classes: usize, row_bytes: usize, chunks: usize) -> usize {
    let (row, height) = (row_bytes / SIZE, padded(rows));
    let room = classes * row_bytes / 256 * 256 / SIZE;
    room / (row + chunks * height).max(chunks * row + height) / 64 * 64
}

/// What keeping classes costs and saves, in the units of `Choice::cost` times depth.
pub(crate) struct Prices<'a> {
    g: &'a Geometry,
    facts: &'a Facts,
    /// Of a class that is made again, forward and backward.
    again: f64,
}

/// One multiprocessor's products a second: what an H200 sustains.
pub(crate) const RATE: f64 = 0.75e15 / 132.0 / 2.0;
/// A launch's tail, refill and gap, in products: what it takes beyond its waves.
pub(crate) const LAUNCH: f64 = 12e-6 * RATE;
/// The pass over an exponential: 4 bytes at 4 TB/s, in products.
pub(crate) const PASS: f64 = 1e-12 * RATE;

impl Prices<'_> {
    /// Prices beside a backward that makes the rest again in chunks of `width` classes.
    pub fn new<'a>(g: &'a Geometry, facts: &'a Facts, width: usize) -> Prices<'a> {
        let mut prices = Prices { g, facts, again: 0.0 };
        let depth = g.features as f64;
        let forward = prices.cost(Operation::OnlineRest, g.rows, g.classes) * depth;
        let backward = prices.cost(Operation::GradientCe, g.rows, width) * depth
            + products_cost(g, facts, width)
            + LAUNCH;
        prices.again = forward / g.classes as f64 + backward / width as f64;
        prices
    }

    fn cost(&self, operation: Operation, m: usize, n: usize) -> f64 {
        choose(self.facts, operation, self.g.dtype, false, m, n)
            .map_or(0.0, |choice| choice.cost(self.facts, m, n))
    }

    /// Time of a kept chunk of `width` classes.
    fn kept(&self, width: usize) -> f64 {
        let (rows, depth) = (self.g.rows, self.g.features as f64);
        // The gradient of an entropy takes a pass over the exponentials.
        let pass = if self.g.entropy() { (rows * width) as f64 * PASS + LAUNCH } else { 0.0 };
        let forward = self.cost(Operation::StoreExp, rows, width) * depth;
        forward + LAUNCH + products_cost(self.g, self.facts, width) + pass
    }

    /// What a kept chunk of `width` classes saves; it may be less than nothing.
    fn saving(&self, width: usize) -> f64 {
        width as f64 * self.again - self.kept(width)
    }

    /// The chunks in the gradient of the weight that save most, or none.
    pub fn lent(&self, row_bytes: usize) -> Strip {
        let candidates = (1..=MOST_CHUNKS).filter_map(|chunks| {
            let most = lent_width(self.g.rows, self.g.classes, row_bytes, chunks);
            self.best(chunks, most).map(|(width, saving)| (chunks, width, saving))
        });
        let best = candidates.max_by(|a, b| a.2.total_cmp(&b.2));
        best.map_or(Strip::default(), |(chunks, width, _)| Strip {
            first: 0,
            classes: chunks * width,
            width,
        })
    }

    /// Chunks of at most `most` classes behind `first`, in `bytes` of memory of their own; and the
    /// width, of at most `widest` classes, of the tiles that make the others again.
    pub fn own(&self, first: usize, most: usize, bytes: usize, widest: usize) -> (Strip, usize) {
        let left = self.g.classes - first;
        let room = bytes / (padded(self.g.rows) * SIZE) / 64 * 64;
        let chunks = room.min(left).div_ceil(most.max(64)).max(1);
        let strip = |width: usize| {
            let classes = left.min(chunks * width);
            let width = if classes == 0 { 0 } else { width };
            Strip { first, classes, width }
        };
        // The widest, some narrower ones whose last wave may be fuller, and none at all.
        let most = (room / chunks).min(most).min(left.div_ceil(chunks).next_multiple_of(64));
        let widths = (0..6).map(|k| most.saturating_sub(k * most / 24) / 64 * 64).chain([0]);
        widths
            .map(|width| {
                let strip = strip(width);
                let (tile, others) = self.others(left - strip.classes, widest);
                (strip, tile, self.kept_in(&strip) + others)
            })
            .min_by(|a, b| a.2.total_cmp(&b.2))
            .map(|(strip, tile, _)| (strip, tile))
            .expect("there are seven")
    }

    /// The width of tiles at which `classes` classes are made again fastest, and that time.
    fn others(&self, classes: usize, widest: usize) -> (usize, f64) {
        if classes == 0 {
            return (0, 0.0);
        }
        let (rows, depth) = (self.g.rows, self.g.features as f64);
        let width = even_width(self.g, self.facts, classes, widest);
        let forward = self.cost(Operation::OnlineRest, rows, classes) * depth + LAUNCH;
        (width, forward + backward_cost(self.g, self.facts, classes, width))
    }

    /// Time of all chunks of a strip.
    fn kept_in(&self, strip: &Strip) -> f64 {
        let Some(last) = strip.chunks().checked_sub(1) else { return 0.0 };
        last as f64 * self.kept(strip.width) + self.kept(strip.classes - last * strip.width)
    }

    /// The width of at most `most` at which `chunks` chunks save most, and what they save.
    fn best(&self, chunks: usize, most: usize) -> Option<(usize, f64)> {
        // The widest, and some narrower ones whose last wave may be fuller.
        let widths = (0..6).map(|k| most.saturating_sub(k * most / 24) / 64 * 64);
        widths
            .filter(|&width| width > 0)
            .map(|width| (width, chunks as f64 * self.saving(width)))
            .max_by(|a, b| a.1.total_cmp(&b.1))
            .filter(|&(_, saving)| saving > 0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A backward on bytes: every byte of dW's memory knows whether it holds an unread exponential.
    fn walk(share: &Share, rows: usize, classes: usize, row_bytes: usize) {
        let lender = classes * row_bytes;
        let size = |piece: &Piece| piece.width * padded(rows) * SIZE;
        let pieces: Vec<Piece> = share.pieces(rows, lender).collect();
        let mut unread = vec![false; lender];
        let mut own = vec![false; share.own_bytes(rows)];
        for piece in &pieces {
            let (memory, at) = match piece.place {
                Place::Lent(at) => (&mut unread, at),
                Place::Own(at) => (&mut own, at),
            };
            let bytes = &mut memory[at..at + size(piece)];
            assert!(bytes.iter().all(|&byte| !byte), "chunks overlap: {share:?}");
            assert_eq!(at % 16, 0, "tensor maps want 16 bytes");
            bytes.fill(true);
        }
        let mut next = 0;
        for piece in &pieces {
            assert_eq!(piece.first, next);
            next += piece.count;
            // dW's rows are written while the chunk is read, so it still counts as unread.
            let written = piece.first * row_bytes..next * row_bytes;
            assert!(unread[written].iter().all(|&byte| !byte), "{piece:?} of {share:?}");
            if let Place::Lent(at) = piece.place {
                unread[at..at + size(piece)].fill(false);
            }
        }
        assert_eq!(next, share.classes());
        assert!(next <= classes);
    }

    #[test]
    fn rows_of_the_gradient_never_reach_an_unread_chunk() {
        for rows in [1, 200, 256, 1000, 2048] {
            for features in [8, 64, 96, 520, 2304] {
                for classes in [64, 151, 1000, 5003] {
                    for element in [2, 4] {
                        for chunks in 1..=5 {
                            let row_bytes = features * element;
                            let width = lent_width(rows, classes, row_bytes, chunks);
                            let lent = Strip { first: 0, classes: chunks * width, width };
                            let share = Share { lent, ..Share::default() };
                            walk(&share, rows, classes, row_bytes);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn the_width_is_the_largest_that_fits() {
        let fits = |rows: usize, classes: usize, row_bytes: usize, chunks: usize, width: usize| {
            let room = classes * row_bytes / 256 * 256;
            let block = width * padded(rows) * SIZE;
            chunks * block <= room
                && (0..chunks)
                    .all(|k| (k + 1) * width * row_bytes <= room - chunks * block + k * block)
        };
        for (rows, classes, features) in [
            (8192, 128_256, 4096),
            (8192, 65_536, 1024),
            (2048, 128_256, 4096),
            (1000, 50_257, 768),
        ] {
            for element in [2, 4] {
                for chunks in 1..=MOST_CHUNKS {
                    let row_bytes = features * element;
                    let width = lent_width(rows, classes, row_bytes, chunks);
                    assert!(width == 0 || fits(rows, classes, row_bytes, chunks, width));
                    assert!(!fits(rows, classes, row_bytes, chunks, width + 64));
                }
            }
        }
    }

    #[test]
    fn strips_cover_what_they_say() {
        let lent = Strip { first: 0, classes: 128, width: 64 };
        let own = Strip { first: 128, classes: 151 - 128, width: 64 };
        let share = Share { lent, own, tile: 64, lends: Lends::Weight(4) };
        walk(&share, 8, 151, 4096);
        assert_eq!(share.own_bytes(8), 64 * 256 * 2);
        assert_eq!(share.classes(), 151);
    }
}

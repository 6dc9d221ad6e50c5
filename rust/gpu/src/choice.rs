//! Which kernel makes a product: by waves over the device, weighed with what a tile was measured to cost.

use std::sync::RwLock;

use logitless_core::DType;

use crate::driver::Facts;
use crate::images::{self, Tile};
use crate::launch::suffix;
use crate::product::Operation;

/// Names of the tiles, those that move fewer bytes a product first.
const TILES: [&str; 6] = ["c256x192", "c128x256", "c128x192", "p128x192", "t128x256", "t128x128"];

/// A kernel for a product and its tile.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Choice {
    pub name: &'static str,
    pub tile: Tile,
}

impl Choice {
    /// Classes of one column of partials.
    pub fn part_columns(&self) -> usize {
        // Without clusters (mma.sync) two warps share the tile's columns.
        if self.tile.cluster > 1 { self.tile.n as usize } else { 64 }
    }

    /// Whether the kernel reads its operands through tensor maps.
    pub fn by_maps(&self) -> bool {
        self.tile.cluster > 1
    }

    /// Output tiles, of a whole cluster each.
    pub fn tiles(&self, m: usize, n: usize) -> usize {
        m.div_ceil((self.tile.m * self.tile.cluster) as usize) * n.div_ceil(self.tile.n as usize)
    }

    /// What the last wave of an (m, n, k) product leaves idle, in `slices` shares of k.
    pub fn idle(&self, facts: &Facts, (m, n, k): (usize, usize, usize), slices: usize) -> Idle {
        let clusters = (facts.multiprocessors / self.tile.cluster).max(1) as usize;
        let tiles = self.tiles(m, n) * slices;
        Idle {
            clusters: tiles.next_multiple_of(clusters) - tiles,
            products: self.products(k.div_ceil(slices)),
        }
    }

    /// Products of one multiprocessor in a tile of depth `k`.
    fn products(&self, k: usize) -> f64 {
        f64::from(self.tile.m * self.tile.n) * k as f64
    }

    /// Time of an (m, n) product in units of one multiprocessor's work on one output element of depth one.
    pub fn cost(&self, facts: &Facts, m: usize, n: usize) -> f64 {
        self.cost_of(facts, self.tiles(m, n))
    }

    fn cost_of(&self, facts: &Facts, tiles: usize) -> f64 {
        let clusters = (facts.multiprocessors / self.tile.cluster).max(1) as usize;
        let waves = tiles.div_ceil(clusters) as f64;
        waves * f64::from(self.tile.m * self.tile.n) * self.penalty()
    }

    /// Measured on an H200 at equal wave counts: more bytes a product cost energy, so clock.
    fn penalty(&self) -> f64 {
        match self.tile.name {
            "c256x192" | "t128x128" => 1.0,
            "c128x256" => 1.015,
            _ => 1.03,
        }
    }

    /// The same for an (m, n, k) product, times k, of which the one ahead leaves so much idle: what it
    /// takes from then on.
    pub fn cost_beside(&self, facts: &Facts, (m, n, k): (usize, usize, usize), idle: Idle) -> f64 {
        let clusters = (facts.multiprocessors / self.tile.cluster).max(1) as usize;
        let (tiles, tile) = (self.tiles(m, n), self.products(k) * self.penalty());
        // Some clusters begin early. All have ended when one of either kind ends a tile.
        let early = idle.clusters.min(clusters);
        let made = |time: f64| {
            let by = |count: usize, time: f64| count * (time / tile + 1e-6) as usize;
            by(early, time + idle.products) + by(clusters - early, time)
        };
        let least = (tiles / clusters) as f64 * tile - idle.products;
        let mut ends = [(least / tile).max(0.0).floor() * tile, 0.0];
        ends[1] = ((ends[0] + idle.products) / tile).ceil() * tile - idle.products;
        loop {
            let next = usize::from(ends[1] < ends[0]);
            if made(ends[next]) >= tiles {
                return ends[next];
            }
            ends[next] += tile;
        }
    }
}

/// Clusters without a tile in a product's last wave, for as long as a multiprocessor takes for so
/// many products.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Idle {
    pub clusters: usize,
    pub products: f64,
}

/// How the clusters of a product beside another share its tiles
/// (`cuda/include/logitless/schedule/raster.cuh`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct HeadStart {
    /// Clusters that start well before the others.
    pub early: usize,
    /// Tiles that each of them makes before the others join.
    pub head: usize,
}

impl HeadStart {
    /// Of an (m, n, k) product beside one that leaves so much idle: as few tiles ahead as save most
    /// turns of the whole device.
    pub fn of(
        choice: &Choice,
        (m, n, k): (usize, usize, usize),
        at_once: usize,
        idle: Idle,
    ) -> HeadStart {
        let (tiles, early) = (choice.tiles(m, n), idle.clusters);
        // A start costs about a twentieth of a tile.
        let fit = (idle.products / (1.05 * choice.products(k.max(1)))) as usize;
        let most = fit.min(tiles.saturating_sub(at_once) / early.max(1));
        let turns = |head: usize| (tiles - early * head).div_ceil(at_once);
        let head = (0..=most).min_by_key(|&head| turns(head)).unwrap_or(0);
        HeadStart { early: early.min(at_once), head }
    }
}

/// The kernel for a product of (m, n) outputs on a device, if there is one.
pub(crate) fn choose(
    facts: &Facts,
    operation: Operation,
    dtype: DType,
    mapped: bool,
    m: usize,
    n: usize,
) -> Option<Choice> {
    choose_among(facts, operation, dtype, mapped, |_| true, |choice| choice.cost(facts, m, n))
}

/// The same among the kernels whose clusters divide blocks of 256 rows, which listed blocks and
/// slices consist of.
pub(crate) fn choose_gated(
    facts: &Facts,
    operation: Operation,
    dtype: DType,
    mapped: bool,
    m: usize,
    n: usize,
) -> Option<Choice> {
    let fits = |tile: &Tile| 256_u32.is_multiple_of(tile.m * tile.cluster);
    choose_among(facts, operation, dtype, mapped, fits, |choice| choice.cost(facts, m, n))
}

/// Products a second of one multiprocessor.
const PRODUCTS: f64 = 0.6e15 / 132.0 / 2.0;

/// The kernel for the input's gradient in `slices` shares of its depth, and its time as `cost` times depth.
pub(crate) fn choose_sliced(
    facts: &Facts,
    dtype: DType,
    (m, n, k): (usize, usize, usize),
    slices: usize,
) -> Option<(Choice, f64)> {
    let (fold, fits): (f64, fn(&Tile) -> bool) = if slices == 1 {
        (0.0, |_| true)
    } else {
        // Sums are written and read again, mostly in the L2.
        let bytes = 8 * slices * m.next_multiple_of(256) * n;
        (bytes as f64 / 2.5e12 + 2e-6, |tile| 256_u32.is_multiple_of(tile.m * tile.cluster))
    };
    let depth = k.div_ceil(64).div_ceil(slices) * 64;
    let cost = |choice: &Choice| choice.cost_of(facts, choice.tiles(m, n) * slices) * depth as f64;
    let choice = choose_among(facts, Operation::DeF32, dtype, false, fits, cost)?;
    let cost = cost(&choice) + fold * PRODUCTS;
    Some((choice, cost))
}

/// Shares of the depth that the gradient of the input is cut into: few rows make few tiles, which would
/// leave most multiprocessors idle. Each share has sums of its own, folded in order at the end.
pub(crate) fn slices(facts: &Facts, dtype: DType, shape: (usize, usize, usize)) -> usize {
    let cost = |slices| choose_sliced(facts, dtype, shape, slices).map(|found| found.1);
    let Some(whole) = cost(1) else { return 1 };
    let most = (shape.2 / 512).clamp(1, 32);
    (2..=most)
        .filter_map(|slices| cost(slices).map(|cost| (slices, cost)))
        .filter(|&(_, cost)| cost < 0.9 * whole)
        .min_by(|a, b| a.1.total_cmp(&b.1))
        .map_or(1, |found| found.0)
}

fn choose_among(
    facts: &Facts,
    operation: Operation,
    dtype: DType,
    mapped: bool,
    fits: impl Fn(&Tile) -> bool,
    cost: impl Fn(&Choice) -> f64,
) -> Option<Choice> {
    if dtype == DType::F64 {
        return None;
    }
    // A kernel with the map also makes plain logits, and is the only one on some architectures.
    let maps: &[usize] = match (operation.mapped(), mapped) {
        (false, _) => &[0],
        (true, false) => &[0, 1],
        (true, true) => &[1],
    };
    let kernels = kernels(facts);
    let found = |operation: Operation| {
        maps.iter().find_map(|&map| {
            let choices = kernels[operation as usize][half(dtype)][map].iter().flatten();
            choices
                .filter(|choice| fits(&choice.tile))
                .min_by(|a, b| cost(a).total_cmp(&cost(b)))
                .copied()
        })
    };
    found(operation).or_else(|| found(operation.general()?))
}

/// Index of an operand type among those of tensor-core kernels.
fn half(dtype: DType) -> usize {
    match dtype {
        DType::Bf16 => 0,
        DType::F16 => 1,
        _ => 2,
    }
}

/// By operation, operand type, map and tile.
type Kernels = [[[[Option<Choice>; TILES.len()]; 2]; 3]; Operation::ALL.len()];

/// The kernels that a device can run, found by name once: a plan looks at thousands of choices, and
/// a step at a dozen.
fn kernels(facts: &Facts) -> &'static Kernels {
    type Known = Vec<((u32, u32), u32, &'static Kernels)>;
    static KNOWN: RwLock<Known> = RwLock::new(Vec::new());
    let same = |known: &Known| {
        known.iter().find(|k| (k.0, k.1) == (facts.capability, facts.shared)).map(|k| k.2)
    };
    if let Some(kernels) = same(&KNOWN.read().unwrap_or_else(|poison| poison.into_inner())) {
        return kernels;
    }
    let mut kernels = Box::new([[[[None; TILES.len()]; 2]; 3]; Operation::ALL.len()]);
    for operation in Operation::ALL {
        for dtype in [DType::Bf16, DType::F16, DType::F32] {
            for (map, letter) in ["", "m"].into_iter().enumerate() {
                for (slot, tile) in TILES.iter().enumerate() {
                    let name = format!("{}_{}{letter}_{tile}", operation.name(), suffix(dtype));
                    kernels[operation as usize][half(dtype)][map][slot] =
                        images::tile(&name, facts).map(|(name, tile)| Choice { name, tile });
                }
            }
        }
    }
    let kernels: &'static Kernels = Box::leak(kernels);
    let mut known = KNOWN.write().unwrap_or_else(|poison| poison.into_inner());
    // Another thread may have been first; its table is the same.
    known.push((facts.capability, facts.shared, kernels));
    kernels
}

/// Whether an operation has a kernel of its own on a device.
pub(crate) fn exists(facts: &Facts, operation: Operation, dtype: DType) -> bool {
    choose(facts, operation, dtype, false, 1, 1).is_some_and(|choice| {
        choice.name.starts_with(&format!("{}_{}", operation.name(), suffix(dtype)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_rows_are_summed_in_slices() {
        let facts = Facts::h200();
        let slices = |m, n, k| slices(&facts, DType::Bf16, (m, n, k));
        if choose(&facts, Operation::DeF32, DType::Bf16, false, 1, 1).is_none() {
            return;
        }
        assert_eq!(slices(8192, 4096, 128_256), 1);
        assert_eq!(slices(8, 64, 500), 1);
        for (m, n, k) in [(1, 1024, 50_304), (128, 1024, 50_304), (1024, 1024, 50_304)] {
            let found = slices(m, n, k);
            assert!(found > 1, "{m} rows: {found}");
            let sums = found * m.next_multiple_of(256) * n * 4;
            assert!(sums <= 64 << 20, "{m} rows: {sums} bytes of sums");
        }
    }

    #[test]
    fn what_one_product_leaves_idle_the_next_one_fills() {
        let facts = Facts::h200();
        let choose = |operation, m, n| choose(&facts, operation, DType::Bf16, false, m, n);
        let start = |rows, features, classes| {
            let de = choose(Operation::De, rows, features)?;
            let dw = choose(Operation::Dw, classes, features)?;
            let idle = de.idle(&facts, (rows, features, classes), 1);
            Some(HeadStart::of(&dw, (classes, features, rows), 66, idle))
        };
        let Some(large) = start(8192, 4096, 128_256) else { return };
        // dE: 512 tiles of 66 clusters, 16 of which have none in the last wave: each would last for
        // 15.66 tiles of dW, of which there are 8016 = 119 x 66 + 162: 119 turns instead of 122.
        assert_eq!(large, HeadStart { early: 16, head: 11 });
        // 8316 tiles in 123 turns instead of 126.
        assert_eq!(start(8192, 3584, 152_064).unwrap(), HeadStart { early: 14, head: 15 });
        // 1024 = 15 x 66 + 34 tiles: no turn less.
        assert_eq!(start(8192, 1024, 65_536).unwrap(), HeadStart { early: 4, head: 0 });
        // A chunk of a recomputing backward: dE's tiles are as short as dW's.
        assert_eq!(start(8192, 4096, 8448).unwrap(), HeadStart { early: 16, head: 0 });
        // Fewer tiles than clusters.
        assert_eq!(start(256, 256, 2048).unwrap().head, 0);
    }

    #[test]
    fn beside_costs_what_is_left_of_the_work() {
        let facts = Facts::h200();
        let Some(dw) = choose(&facts, Operation::Dw, DType::Bf16, false, 8192, 1024) else {
            return;
        };
        if !dw.by_maps() {
            return;
        }
        let rows = 8192;
        let clusters = (facts.multiprocessors / dw.tile.cluster) as usize;
        for classes in [64, 4096, 8192, 12_544, 65_536] {
            let shape = (classes, 1024, rows);
            let alone = dw.cost(&facts, classes, 1024) * rows as f64;
            let mut last = alone * 1.001;
            for idle in [0, 2, 16, clusters - 1] {
                let tile = dw.products(rows);
                let found = dw.cost_beside(&facts, shape, Idle { clusters: idle, products: tile });
                assert!(found <= last, "{classes} classes, {idle} idle: {found} of {alone}");
                // Never less than the work that is left when all of the head start is used.
                let work = dw.tiles(classes, 1024).saturating_sub(idle) as f64 / clusters as f64;
                assert!(found >= (work - 1e-3) * tile);
                last = found;
            }
        }
    }

    #[test]
    fn operations_are_listed_in_order() {
        for (index, operation) in Operation::ALL.into_iter().enumerate() {
            assert_eq!(operation as usize, index);
        }
    }
}

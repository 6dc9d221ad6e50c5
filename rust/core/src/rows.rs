//! Which rows a call works on, in panels of 32, and the classes that single rows point at.

use crate::kernel::LANES;
use crate::operands::Ids;

/// The live rows: all of them, or the listed ones.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows<'a> {
    list: Option<&'a [u32]>,
    count: usize,
}

impl<'a> Rows<'a> {
    /// Lists in `space` the rows of `0..count` that are live.
    pub(crate) fn new(count: usize, space: &'a mut [u32], live: impl Fn(usize) -> bool) -> Self {
        let mut kept = 0;
        for row in 0..count {
            if live(row) {
                space[kept] = row as u32;
                kept += 1;
            }
        }
        let list = (kept < count).then_some(&space[..kept]);
        Self { list, count: kept }
    }

    /// Number of live rows.
    pub(crate) fn len(&self) -> usize {
        self.count
    }

    /// Number of panels.
    pub(crate) fn panels(&self) -> usize {
        self.count.div_ceil(LANES)
    }

    /// The row in a place of the list.
    #[inline]
    fn row(&self, place: usize) -> usize {
        self.list.map_or(place, |list| list[place] as usize)
    }

    /// The rows of a panel, lane by lane.
    pub(crate) fn panel(&self, panel: usize) -> impl ExactSizeIterator<Item = usize> + use<'a> {
        let rows = *self;
        let first = panel * LANES;
        (first..(first + LANES).min(self.count)).map(move |place| rows.row(place))
    }
}

/// A class that a row points at: sorts by class, then lane, then column.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key(u64);

impl Key {
    const LANE_SHIFT: u32 = 16;
    const CLASS_SHIFT: u32 = Self::LANE_SHIFT + LANES.ilog2();

    /// The largest V.
    pub(crate) const MAX_CLASSES: usize = 1 << (64 - Self::CLASS_SHIFT);

    pub(crate) fn new(class: usize, lane: usize, column: usize) -> Self {
        debug_assert!(class < Self::MAX_CLASSES && lane < LANES && column < 1 << Self::LANE_SHIFT);
        let high = (class as u64) << Self::CLASS_SHIFT;
        Self(high | (lane as u64) << Self::LANE_SHIFT | column as u64)
    }

    pub(crate) fn class(self) -> usize {
        (self.0 >> Self::CLASS_SHIFT) as usize
    }

    pub(crate) fn lane(self) -> usize {
        (self.0 >> Self::LANE_SHIFT) as usize % LANES
    }

    pub(crate) fn column(self) -> usize {
        self.0 as usize % (1 << Self::LANE_SHIFT)
    }
}

/// Lists the target classes of a panel's rows in `space`, sorted; returns how many there are.
pub(crate) fn list_targets(
    ids: &Ids,
    rows: impl Iterator<Item = usize>,
    space: &mut [Key],
) -> usize {
    let mut count = 0;
    for (lane, row) in rows.enumerate() {
        for (column, class) in ids.classes(row) {
            space[count] = Key::new(class, lane, column);
            count += 1;
        }
    }
    space[..count].sort_unstable();
    count
}

/// The part of a sorted list that points into `first..end`.
pub(crate) fn within<T>(sorted: &[T], key: impl Fn(&T) -> Key, first: usize, end: usize) -> &[T] {
    let from = sorted.partition_point(|item| key(item).class() < first);
    let len = sorted[from..].partition_point(|item| key(item).class() < end);
    &sorted[from..from + len]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_sort_by_class_and_give_their_parts_back() {
        let key = Key::new(1 << 40, 31, 65_535);
        assert_eq!((key.class(), key.lane(), key.column()), (1 << 40, 31, 65_535));
        assert!(Key::new(3, 31, 9) < Key::new(4, 0, 0));
        let sorted = [1, 3, 3, 8].map(|class| Key::new(class, 0, 0));
        assert_eq!(within(&sorted, |&key| key, 2, 8), &sorted[1..3]);
    }

    #[test]
    fn rows_are_listed_only_where_some_are_dropped() {
        let mut space = [0; 70];
        let all = Rows::new(70, &mut space, |_| true);
        assert!(all.list.is_none());
        assert_eq!(all.panel(2).collect::<Vec<_>>(), [64, 65, 66, 67, 68, 69]);
        let odd = Rows::new(70, &mut space, |row| row % 2 == 1);
        assert_eq!((odd.len(), odd.panels()), (35, 2));
        assert_eq!(odd.panel(1).collect::<Vec<_>>(), [65, 67, 69]);
    }
}

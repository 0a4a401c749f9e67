//! Pairs of row and feature that wait for their scores.

/// Pairs to be scored, and their order by feature.
#[derive(Debug, Default)]
pub(super) struct Pairs {
    /// Feature and row of every pair, as they came.
    pub(super) listed: Vec<(u32, u32)>,
    starts: Vec<u32>,
    /// Row and feature of every pair, in order.
    pub(super) rows: Vec<u32>,
    features: Vec<u32>,
    pub(super) products: Vec<f64>,
}

impl Pairs {
    /// The feature of the pair at `start`, and where the pairs of that feature end.
    pub(super) fn group(&self, start: usize) -> (usize, usize) {
        let feature = self.features[start] as usize;
        (feature, self.starts[feature] as usize)
    }

    /// Counting sort of what is listed by feature: each feature is read once per block of rows. Afterwards `starts[j]`
    /// is where the pairs of feature `j` end.
    pub(super) fn sort(&mut self, n_features: usize) {
        self.starts.clear();
        self.starts.resize(n_features + 1, 0);
        for &(feature, _) in &self.listed {
            self.starts[feature as usize + 1] += 1;
        }
        for j in 1..self.starts.len() {
            self.starts[j] += self.starts[j - 1];
        }
        self.rows.resize(self.listed.len(), 0);
        self.features.resize(self.listed.len(), 0);
        for &(feature, row) in &self.listed {
            let place = &mut self.starts[feature as usize];
            self.rows[*place as usize] = row;
            self.features[*place as usize] = feature;
            *place += 1;
        }
    }
}

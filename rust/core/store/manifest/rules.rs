//! What a manifest must keep to before anything it names is touched.
#![deny(clippy::arithmetic_side_effects)]

use std::path::Path;

use serde_json::Value;

use super::{FORMAT, MANY_ROWS, Manifest, SAMPLES, Step, Table, broken, step_name};
use crate::error::{Error, Result};
use crate::store::format::{CHECKS, Column, HEADER, PADDING, Shard};
use crate::store::keys::Unknown;

impl Manifest {
    /// Refuses keys of a later version that must be understood.
    pub(super) fn refuse_unknown(&self, top: &Unknown, path: &Path) -> Result<()> {
        let tables = self.tables().map(|t| &t.unknown);
        let columns = self.tables().flat_map(|t| t.columns.iter().map(|c| &c.unknown));
        let files = self.steps.iter().flat_map(|s| s.files.iter().map(|f| &f.unknown));
        let steps = self.steps.iter().map(|s| &s.unknown);
        let all = std::iter::once(top).chain(tables).chain(columns).chain(steps).chain(files);
        for (key, value) in all.flatten() {
            if value.get("must_understand") != Some(&Value::Bool(false)) {
                return Err(Error::Version {
                    path: path.into(),
                    found: format!("{}.{} with {key:?}", self.format.major, self.format.minor),
                    supported: format!("{}.{}", FORMAT.major, FORMAT.minor),
                });
            }
        }
        Ok(())
    }

    /// Holds hooks, spaces and steps to the rules of the format.
    ///
    /// # Errors
    /// [`Error::Manifest`] with the rule that is broken.
    pub fn validate(&self, path: &Path) -> Result<()> {
        if self.hooks.is_empty() {
            return Err(broken(path, "no hooks"));
        }
        let mut names = std::collections::HashSet::new();
        for table in self.tables() {
            table.validate(path)?;
            if !names.insert(table.file_name()) {
                return Err(broken(path, &format!("two tables share the file name {:?}", table.file_name())));
            }
        }
        let spaces: Vec<&str> = self.spaces.iter().map(|s| s.name.as_str()).collect();
        if let Some(hook) = self.hooks.iter().find(|h| !spaces.contains(&h.row_space())) {
            let found = format!("hook {:?}: unknown row space {:?}", hook.name, hook.row_space());
            return Err(broken(path, &found));
        }
        for (index, step) in self.steps.iter().enumerate() {
            self.validate_step(step, index, path)?;
        }
        for space in spaces {
            let counts = self.steps.iter().filter_map(|s| s.rows.get(space));
            if counts.copied().try_fold(0_u64, u64::checked_add).is_none() {
                return Err(broken(path, &format!("rows of space {space:?} overflow")));
            }
        }
        Ok(())
    }

    fn validate_step(&self, step: &Step, index: usize, path: &Path) -> Result<()> {
        for name in std::iter::once(&step.name).chain(step.files.iter().map(|f| &f.name)) {
            if !is_safe(name) {
                return Err(broken(path, &format!("unsafe shard name {name:?}")));
            }
        }
        if step.name != step_name(index) {
            return Err(broken(
                path,
                &format!("expected step {:?}, found {:?}", step_name(index), step.name),
            ));
        }
        if step.rows.len() != self.spaces.len() {
            return Err(broken(path, &format!("step {}: rows of other spaces than declared", step.name)));
        }
        let mut files = step.files.iter();
        for table in self.tables() {
            let wrong = |what: &str| broken(path, &format!("step {}, {:?}: {what}", step.name, table.name));
            let rows = *step.rows.get(table.row_space()).ok_or_else(|| wrong("no number of rows"))?;
            let file = files.next().filter(|f| f.name == table.file_name());
            let file = file.ok_or_else(|| wrong(&format!("expected file {:?}", table.file_name())))?;
            let shard = Shard::new(&table.columns, rows).ok_or_else(|| wrong("shape overflows"))?;
            if shard.file_len != file.bytes {
                return Err(wrong(&format!("expected {} bytes, found {}", shard.file_len, file.bytes)));
            }
        }
        match (files.next(), files.next()) {
            (Some(file), None) if file.name == SAMPLES => Ok(()),
            _ => Err(broken(path, &format!("step {}: expected {SAMPLES:?} as the last file", step.name))),
        }
    }
}

impl Table {
    fn validate(&self, path: &Path) -> Result<()> {
        let wrong = |what: String| Err(broken(path, &format!("table {:?}: {what}", self.name)));
        let reserved = self.space.is_some() && (self.name == "rows" || self.name.starts_with("rows."));
        let file = self.file_name();
        if self.name.is_empty() || reserved || file.len() > 240 {
            return wrong(format!("not a usable name (file {file:?})"));
        }
        for (i, column) in self.columns.iter().enumerate() {
            if column.row_bytes().is_none_or(|bytes| bytes == 0) {
                return wrong(format!("width of {:?}", column.name));
            }
            let twice = self.columns.iter().take(i).any(|c| c.name == column.name);
            if twice || ["", "__metadata__", CHECKS, PADDING].contains(&column.name.as_str()) {
                return wrong(format!("column name {:?}", column.name));
            }
            // Every tensor starts on a multiple of its element, whatever the number of rows.
            let size = column.dtype.size() as u64;
            let before = self.columns.iter().take(i).filter_map(Column::row_bytes);
            if before.into_iter().any(|bytes| !bytes.is_multiple_of(size)) {
                return wrong(format!("column {:?} is not aligned", column.name));
            }
        }
        if self.columns.is_empty() {
            return wrong("no columns".to_owned());
        }
        match Shard::new(&self.columns, MANY_ROWS).map(|s| s.header()) {
            Some(Ok(_)) => Ok(()),
            _ => wrong(format!("header of more than {HEADER} bytes")),
        }
    }
}

fn is_safe(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b'%');
    !name.is_empty() && name.len() <= 255 && name != "." && name != ".." && name.bytes().all(plain)
}

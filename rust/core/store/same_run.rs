//! Whether a run may continue the store it finds.

use std::path::Path;

use crate::error::{Error, Result};
use crate::store::manifest::{FORMAT, MANIFEST, Manifest, Table};

/// Refuses to continue a store of other facts, hooks or row tables.
///
/// # Errors
/// [`Error::Version`] for a store of a later minor version; [`Error::Store`] for a difference, with both sides.
pub fn same_run(found: &Manifest, wanted: &Manifest, root: &Path) -> Result<()> {
    let differ = |what: &str, found: String, wanted: String| {
        let reason = format!("cannot resume: {what}: the store has {found}, this run has {wanted}");
        Err(Error::Store { path: root.into(), reason })
    };
    if found.format.minor > FORMAT.minor {
        return Err(Error::Version {
            path: root.join(MANIFEST),
            found: format!("format {}.{}", found.format.major, found.format.minor),
            supported: format!("up to {}.{} for writing", FORMAT.major, FORMAT.minor),
        });
    }
    let (a, b) = (&found.facts, &wanted.facts);
    if a != b {
        let keys = [a, b].into_iter().filter_map(|v| v.as_object()).flat_map(|o| o.keys());
        let key = keys.into_iter().find(|k| a.get(k) != b.get(k)).cloned().unwrap_or_default();
        let side = |v: &serde_json::Value| v.get(&key).unwrap_or(&serde_json::Value::Null).to_string();
        return differ(&format!("fact {key:?}"), side(a), side(b));
    }
    let names = |m: &Manifest| m.hooks.iter().map(|h| h.name.clone()).collect::<Vec<_>>();
    if names(found) != names(wanted) {
        return differ("hooks", format!("{:?}", names(found)), format!("{:?}", names(wanted)));
    }
    match found.tables().zip(wanted.tables()).find(|(a, b)| a != b) {
        Some((a, b)) => differ(&format!("{:?}", a.name), describe(a), describe(b)),
        None => Ok(()),
    }
}

fn describe(table: &Table) -> String {
    let columns = table.columns.iter().map(|c| match c.width {
        Some(width) => format!("{} {} of width {width}", c.dtype.code(), c.name),
        None => format!("{} {}", c.dtype.code(), c.name),
    });
    format!("{} in space {:?}", columns.collect::<Vec<_>>().join(", "), table.row_space())
}

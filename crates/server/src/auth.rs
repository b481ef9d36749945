//! Who is asking: keys from flags, from a file that is read again when it changes, and from the
//! admission desk.
//!
//! Invariants: presented keys are hashed before they are compared, and all comparisons take the same
//! time, so that time tells nothing about keys; no key is ever written to a log or an answer.

use crate::admission::Desk;
use crate::error::ServerError;
use axum::http::HeaderMap;
use axum::http::header::AUTHORIZATION;
use opentelemetry::trace::SpanContext;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::SystemTime;
use subtle::ConstantTimeEq;

use crate::admission::KeyOwner;

/// Who a request comes from.
#[derive(Clone, Debug)]
pub(crate) struct Principal {
    /// Shares cached prefixes only with itself.
    pub(crate) isolation_key: String,
    /// Whose account it is, when the desk knows the key.
    pub(crate) owner: Option<KeyOwner>,
    /// The trace this request is part of, by its own word.
    pub(crate) trace: Option<SpanContext>,
}

/// The keys of this server.
pub(crate) struct Keys {
    given: Vec<[u8; 32]>,
    file: Option<KeyFile>,
    desk: Option<Arc<Desk>>,
}

struct KeyFile {
    path: PathBuf,
    state: RwLock<(Option<SystemTime>, Vec<[u8; 32]>)>,
}

impl Keys {
    /// Keys given directly, one of a file, and the desk's.
    pub(crate) fn new(
        given: &[String],
        file: Option<&Path>,
        desk: Option<Arc<Desk>>,
    ) -> Result<Self, ServerError> {
        let file = file.map(KeyFile::open).transpose()?;
        let given = given
            .iter()
            .map(|key| crate::admission::hash(key))
            .collect();
        Ok(Self { given, file, desk })
    }

    /// Whether requests need a key at all.
    pub(crate) fn required(&self) -> bool {
        !self.given.is_empty() || self.file.is_some() || self.desk.is_some()
    }

    /// Reads the file again when it changed; keeps the old keys when it cannot be read.
    pub(crate) fn refresh(&self) {
        let Some(file) = &self.file else {
            return;
        };
        match file.refresh() {
            Ok(true) => tracing::info!("API key file read again"),
            Ok(false) => {}
            Err(error) => tracing::warn!(%error, "API key file not read; the old keys stay"),
        }
    }

    /// Whose request it is; `None` when a key is needed and none that fits is there.
    pub(crate) fn principal(&self, headers: &HeaderMap) -> Result<Option<Principal>, ServerError> {
        if !self.required() {
            let isolation_key = String::new();
            let owner = None;
            return Ok(Some(Principal {
                isolation_key,
                owner,
                trace: None,
            }));
        }
        let Some(key) = presented(headers) else {
            return Ok(None);
        };
        let hash = crate::admission::hash(key);
        let mut fits = subtle::Choice::from(0);
        for known in &self.given {
            fits |= known.ct_eq(&hash);
        }
        if let Some(file) = &self.file {
            let state = file.state.read().unwrap_or_else(PoisonError::into_inner);
            for known in &state.1 {
                fits |= known.ct_eq(&hash);
            }
        }
        let isolation_key: String = hash[..8].iter().map(|b| format!("{b:02x}")).collect();
        if bool::from(fits) {
            let owner = None;
            return Ok(Some(Principal {
                isolation_key,
                owner,
                trace: None,
            }));
        }
        let owner = match &self.desk {
            Some(desk) => desk.owner(key)?,
            None => None,
        };
        Ok(owner.map(|owner| Principal {
            isolation_key,
            owner: Some(owner),
            trace: None,
        }))
    }
}

impl KeyFile {
    fn open(path: &Path) -> Result<Self, ServerError> {
        let file = Self {
            path: path.to_owned(),
            state: RwLock::default(),
        };
        file.refresh()?;
        Ok(file)
    }

    /// Reads when the modification time changed; true when it did.
    fn refresh(&self) -> Result<bool, ServerError> {
        let refuse = |message: String| ServerError::File {
            path: self.path.clone(),
            message,
        };
        let meta = std::fs::metadata(&self.path).map_err(|error| refuse(error.to_string()))?;
        let changed_at = meta.modified().ok();
        let known = self.state.read().unwrap_or_else(PoisonError::into_inner).0;
        if known.is_some() && known == changed_at {
            return Ok(false);
        }
        private(&meta).map_err(refuse)?;
        let text =
            std::fs::read_to_string(&self.path).map_err(|error| refuse(error.to_string()))?;
        let keys = text.lines().map(str::trim);
        let keys = keys.filter(|line| !line.is_empty() && !line.starts_with('#'));
        let hashes: Vec<_> = keys.map(crate::admission::hash).collect();
        if hashes.is_empty() {
            return Err(refuse("no key in it; one a line is expected".to_owned()));
        }
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        *state = (changed_at, hashes);
        Ok(true)
    }
}

/// Nobody but the owner may read a file of keys.
#[cfg(unix)]
fn private(meta: &std::fs::Metadata) -> Result<(), String> {
    use std::os::unix::fs::PermissionsExt;
    let mode = meta.permissions().mode() & 0o777;
    match mode & 0o077 {
        0 => Ok(()),
        _ => Err(format!(
            "mode is {mode:03o}; expected 600, readable by its owner only"
        )),
    }
}

#[cfg(not(unix))]
fn private(_: &std::fs::Metadata) -> Result<(), String> {
    Ok(())
}

/// OpenAI's, Anthropic's and MiMo's way to send a key.
fn presented(headers: &HeaderMap) -> Option<&str> {
    if let Some(value) = headers.get(AUTHORIZATION).and_then(|v| v.to_str().ok()) {
        let (scheme, key) = value.split_once(' ')?;
        return scheme.eq_ignore_ascii_case("bearer").then(|| key.trim());
    }
    let named = |name| headers.get(name).and_then(|v| v.to_str().ok());
    named("x-api-key").or_else(|| named("api-key"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;

    fn headers(name: &'static str, value: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(name, value.parse().unwrap());
        headers
    }

    #[test]
    fn three_ways_to_send_a_key() {
        let keys = Keys::new(&["secret".to_owned()], None, None).unwrap();
        for (name, value, fits) in [
            ("authorization", "Bearer secret", true),
            ("authorization", "bearer secret", true),
            ("authorization", "Basic secret", false),
            ("x-api-key", "secret", true),
            ("api-key", "secret", true),
            ("api-key", "secre", false),
        ] {
            let found = keys.principal(&headers(name, value)).unwrap();
            assert_eq!(found.is_some(), fits, "{name}: {value}");
        }
        assert!(keys.principal(&HeaderMap::new()).unwrap().is_none());
    }

    #[test]
    fn different_keys_do_not_share_prefixes() {
        let keys = Keys::new(&["a".to_owned(), "b".to_owned()], None, None).unwrap();
        let isolation = |key| {
            keys.principal(&headers("api-key", key))
                .unwrap()
                .unwrap()
                .isolation_key
        };
        assert_ne!(isolation("a"), isolation("b"));
    }

    #[test]
    fn the_file_is_private_and_read_again() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        writeln!(file, "# keys\nfirst\n").unwrap();
        let mode =
            |mode| std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(mode));
        mode(0o644).unwrap();
        assert!(Keys::new(&[], Some(file.path()), None).is_err());
        mode(0o600).unwrap();
        let keys = Keys::new(&[], Some(file.path()), None).unwrap();
        assert!(
            keys.principal(&headers("api-key", "first"))
                .unwrap()
                .is_some()
        );
        std::fs::write(file.path(), "second\n").unwrap();
        let later = SystemTime::now() + std::time::Duration::from_secs(5);
        file.as_file().set_modified(later).unwrap();
        keys.refresh();
        assert!(
            keys.principal(&headers("api-key", "first"))
                .unwrap()
                .is_none()
        );
        assert!(
            keys.principal(&headers("api-key", "second"))
                .unwrap()
                .is_some()
        );
    }
}

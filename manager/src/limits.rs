//! The limits that are set: stored, and told to the members as they change.

use std::sync::Arc;

use darter_types::Rates;
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::core::limits::{Table, Whose};
use crate::db::{Audit, StorageError, Store};

#[derive(Clone)]
pub(crate) struct Limits {
    store: Store,
    told: Arc<watch::Sender<Table>>,
    /// One change at a time, so that what is told last is what is stored.
    turn: Arc<Mutex<()>>,
}

impl Limits {
    pub(crate) async fn load(store: Store) -> Result<Self, StorageError> {
        let table = store.call(|storage| storage.limits()).await?;
        Ok(Self { store, told: Arc::new(watch::Sender::new(table)), turn: Arc::default() })
    }

    pub(crate) fn table(&self) -> watch::Receiver<Table> {
        self.told.subscribe()
    }

    /// Sets all limits of `whose`, in place of those before; `false` if no such member ever joined.
    pub(crate) async fn set(&self, whose: Whose, rates: Rates, audit: Audit) -> Result<bool, StorageError> {
        let (told, turn) = (self.told.clone(), self.turn.clone());
        let change = self.store.call(move |storage| {
            let _turn = turn.lock();
            if let Whose::Member(role, node) = &whose
                && storage.member(*role, node)?.is_none()
            {
                return Ok(false);
            }
            storage.set_limits(&whose, &rates)?;
            storage.record(&audit)?;
            told.send_replace(storage.limits()?);
            Ok(true)
        });
        change.await
    }
}

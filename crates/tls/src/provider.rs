//! Makes rustls configurations with ring, the only crypto provider.

use std::sync::Arc;
use tokio_rustls::rustls::{
    ConfigBuilder, ConfigSide, WantsVerifier, WantsVersions,
    crypto::{CryptoProvider, ring},
};

pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

pub(crate) fn with_ring<S: ConfigSide>(
    builder: fn(Arc<CryptoProvider>) -> ConfigBuilder<S, WantsVersions>,
) -> ConfigBuilder<S, WantsVerifier> {
    builder(provider()).with_safe_default_protocol_versions().expect("ring has TLS 1.2 and 1.3")
}

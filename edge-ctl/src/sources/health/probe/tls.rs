//! TLS towards a backend. Without `ca` any certificate is accepted: pods' certificates are made for the names clients use,
//! and the check asks whether the backend serves, not who it is. With `ca` chain and name must hold.

use std::{net::SocketAddr, sync::Arc};

use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject},
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::Trouble;
use crate::model::Tls;

/// What a handshake needs, made once for all backends with these settings.
#[derive(Clone)]
pub struct Connector {
    connector: TlsConnector,
    name: Option<ServerName<'static>>,
}

/// Reads the authorities and prepares.
///
/// # Errors
/// Where they cannot be read, in words.
pub fn connector(tls: &Tls, http2: bool) -> Result<Connector, String> {
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    let mut config = match &tls.ca {
        Some(path) => {
            let unreadable = |error: &dyn std::fmt::Display| format!("`ca` {}: {error}", path.display());
            let mut roots = RootCertStore::empty();
            let certificates = CertificateDer::pem_file_iter(path).map_err(|error| unreadable(&error))?;
            for certificate in certificates {
                let certificate = certificate.map_err(|error| unreadable(&error))?;
                roots.add(certificate).map_err(|error| unreadable(&error))?;
            }
            if roots.is_empty() {
                return Err(unreadable(&"no certificate in it"));
            }
            builder.with_root_certificates(roots).with_no_client_auth()
        }
        None => builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
            .with_no_client_auth(),
    };
    config.enable_sni = tls.server_name.is_some();
    if http2 {
        config.alpn_protocols = vec![b"h2".to_vec()];
    }
    // A resumed session would leave the certificate out of what is checked.
    config.resumption = rustls::client::Resumption::disabled();
    let name = tls.server_name.as_ref().map(|name| ServerName::try_from(name.clone())).transpose();
    let name = name.map_err(|error| format!("`server_name`: {error}"))?;
    Ok(Connector { connector: TlsConnector::from(Arc::new(config)), name })
}

pub(super) async fn handshake(
    tcp: TcpStream,
    address: SocketAddr,
    connector: Option<&Result<Connector, String>>,
) -> Result<TlsStream<TcpStream>, Trouble> {
    let missing = || Trouble::Local("no TLS settings".to_owned());
    let connector = connector.ok_or_else(missing)?.as_ref().map_err(|error| Trouble::Local(error.clone()))?;
    let name = connector.name.clone().unwrap_or_else(|| ServerName::from(address.ip()));
    connector.connector.connect(name, tcp).await.map_err(|error| Trouble::io("TLS", &error))
}

/// Accepts whatever is shown.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        // Possession of the key of a certificate that anybody may have made proves nothing.
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

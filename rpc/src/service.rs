//! The gRPC API of the directory. Nothing here is about tracing, because a layer does that ([`crate::layers`]).

use crate::directory::Directory;
use proto::{
    login::MobileNumber,
    usercenter::v1::{GetUserByMobileRequest, GetUserByMobileResponse, User, usercenter_server::Usercenter},
};
use tonic::{Request, Response, Status};

/// Implements `usercenter.v1.Usercenter`.
#[derive(Debug)]
pub struct Service {
    directory: Directory,
}

impl Service {
    /// Makes a service over these users.
    pub fn new(directory: Directory) -> Self {
        Self { directory }
    }
}

/// Why a user can't be returned.
#[derive(Debug, thiserror::Error)]
enum LookupError {
    #[error("mobile must be 7 to 15 digits")]
    NotAMobileNumber,
    #[error("no user with this mobile number")]
    UnknownUser,
}

impl From<LookupError> for Status {
    fn from(error: LookupError) -> Self {
        match error {
            LookupError::NotAMobileNumber => Status::invalid_argument(error.to_string()),
            LookupError::UnknownUser => Status::not_found(error.to_string()),
        }
    }
}

#[tonic::async_trait]
impl Usercenter for Service {
    async fn get_user_by_mobile(
        &self,
        request: Request<GetUserByMobileRequest>,
    ) -> Result<Response<GetUserByMobileResponse>, Status> {
        let mobile = MobileNumber::try_from(request.into_inner().mobile);
        let mobile = mobile.map_err(|_| LookupError::NotAMobileNumber)?;
        let user = self.directory.by_mobile(mobile.as_str()).ok_or(LookupError::UnknownUser)?;
        tracing::info!(%user.id, "user found");
        let user = User { id: user.id, nickname: user.nickname.to_owned() };
        Ok(Response::new(GetUserByMobileResponse { user: Some(user) }))
    }
}

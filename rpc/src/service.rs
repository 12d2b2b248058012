//! The gRPC API of the directory. Nothing here traces, because a layer does that ([`crate::layers`]).

use crate::directory;
use proto::{
    login::MobileNumber,
    usercenter::v1::{GetUserByMobileRequest, GetUserByMobileResponse, usercenter_server::Usercenter},
};
use tonic::{Request, Response, Status};

/// Implements `usercenter.v1.Usercenter`.
#[derive(Debug)]
pub struct Service;

#[tonic::async_trait]
impl Usercenter for Service {
    async fn get_user_by_mobile(
        &self,
        request: Request<GetUserByMobileRequest>,
    ) -> Result<Response<GetUserByMobileResponse>, Status> {
        let mobile = MobileNumber::try_from(request.into_inner().mobile);
        let mobile = mobile.map_err(|_| Status::invalid_argument("mobile must be 7 to 15 digits"))?;
        let user = directory::by_mobile(mobile.as_str());
        let user = user.ok_or_else(|| Status::not_found("no user with this mobile number"))?;
        tracing::info!(%user.id, "user found");
        Ok(Response::new(GetUserByMobileResponse { user: Some(user) }))
    }
}

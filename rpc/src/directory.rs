//! Holds the users in memory. For now, there are three of them.

use proto::usercenter::v1::User;

/// The mobile number, the id and the nickname of each user.
const USERS: [(&str, u64, &str); 3] =
    [("13800138000", 1, "Ada"), ("13800138001", 2, "Grace"), ("13800138002", 3, "Barbara")];

/// Returns the user who registered `mobile`, if anybody did.
pub fn by_mobile(mobile: &str) -> Option<User> {
    let (_, id, nickname) = USERS.into_iter().find(|(known, ..)| *known == mobile)?;
    Some(User { id, nickname: nickname.to_owned() })
}

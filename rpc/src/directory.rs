//! Holds the users in memory. For now, there are three of them.

/// Somebody who may log in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// The user's id, which is never reused.
    pub id: u64,
    /// What the user wants to be called.
    pub nickname: &'static str,
}

/// Users by mobile number.
#[derive(Debug)]
pub struct Directory {
    users: Vec<(&'static str, User)>,
}

impl Directory {
    /// Makes a directory of three users, for trying things out.
    pub fn demo() -> Self {
        let user = |id, nickname| User { id, nickname };
        Self {
            users: vec![
                ("13800138000", user(1, "Ada")),
                ("13800138001", user(2, "Grace")),
                ("13800138002", user(3, "Barbara")),
            ],
        }
    }

    /// Returns the user who registered `mobile`, if anybody did.
    pub fn by_mobile(&self, mobile: &str) -> Option<&User> {
        self.users.iter().find(|(known, _)| *known == mobile).map(|(_, user)| user)
    }
}

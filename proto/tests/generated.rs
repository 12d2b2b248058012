//! Checks that the generated code in `src/generated` is what the `.proto` compiles to.
//!
//! The generated code is committed, so that a build needs neither protoc nor a build script, and so that
//! people can read the code. `UPDATE=1 cargo test -p proto --test generated` writes the code anew.

use std::{fs, path::Path};

#[test]
fn generated_code_matches_the_proto() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let out = tempfile::tempdir().unwrap();
    let mut compiler = protox::Compiler::new([root]).unwrap();
    compiler.include_source_info(true).open_file("usercenter/v1/usercenter.proto").unwrap();
    fs::write(out.path().join("usercenter.v1.bin"), compiler.encode_file_descriptor_set()).unwrap();
    tonic_prost_build::configure()
        .out_dir(out.path())
        // Without Debug, the mobile number in the request can't end up in a log.
        .skip_debug(["usercenter.v1.GetUserByMobileRequest"])
        .compile_fds(compiler.file_descriptor_set())
        .unwrap();

    for file in ["usercenter.v1.rs", "usercenter.v1.bin"] {
        let fresh = fs::read(out.path().join(file)).unwrap();
        let committed = root.join("src/generated").join(file);
        if std::env::var_os("UPDATE").is_some() {
            fs::write(&committed, &fresh).unwrap();
        }
        assert!(
            fs::read(&committed).unwrap_or_default() == fresh,
            "{file} is stale; run: UPDATE=1 cargo test -p proto --test generated"
        );
    }
}

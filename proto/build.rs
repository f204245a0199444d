//! Compiles `darter/darter.proto` without `protoc`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=darter");
    let files = protox::compile(["darter/darter.proto"], ["."])?;
    tonic_prost_build::configure().build_transport(false).bytes(".darter.v1.MapPart").compile_fds(files)?;
    Ok(())
}

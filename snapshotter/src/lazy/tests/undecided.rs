//! What people are told of decisions that take their time.

use super::*;

#[tokio::test]
async fn what_is_being_decided_is_told_with_what_is_known_and_who_is_asked() {
    let root = tempfile::tempdir().unwrap();
    let node = node(&root, World::new([Mood::Fine, Mood::Mute, Mood::Fine]));
    node.pull().await;
    let open = node.lazy.images(|decision| decision.names == ["r.example/app"]).unwrap().remove(0);
    assert_eq!((open.decided, lazy_layers(&open)), (None, vec![Some(true), None, None]));
    assert!(open.layers[1].reason.contains("the mesh and https://r.example"), "{open:?}");
    assert!(node.lazy.images(|_| false).unwrap().is_empty());
    node.world.turn(1, Mood::Fine);
    assert_eq!(lazy_layers(&node.decided().await), [Some(true); 3]);
    assert_eq!(node.lazy.images(|_| true).unwrap().len(), 1, "it is told once");
}

#[tokio::test]
async fn a_decision_that_outlives_its_plan_is_told_until_it_is_made() {
    let root = tempfile::tempdir().unwrap();
    let node = node(&root, World::new([Mood::Fine, Mood::Mute, Mood::Fine]));
    node.pull().await;
    let image = node.lazy.decider.undecided().remove(0).image;
    // As when it is too old, and another image's layer is asked for.
    node.lazy.decider.forget(&image);
    let open = node.lazy.images(|_| true).unwrap().pop().expect("it is still being decided");
    assert_eq!((open.decided, lazy_layers(&open)), (None, vec![Some(true), None, None]));
    node.world.turn(1, Mood::Fine);
    assert_eq!(lazy_layers(&node.decided().await), [Some(true); 3]);
    assert!(node.lazy.decider.undecided().is_empty());
}

#[tokio::test]
async fn a_later_decision_of_an_image_takes_the_place_of_one_that_still_goes_on() {
    let root = tempfile::tempdir().unwrap();
    let node = node(&root, World::new([Mood::Fine, Mood::Mute, Mood::Fine]));
    node.pull().await;
    let image = node.lazy.decider.undecided().remove(0).image;
    node.lazy.decider.forget(&image);
    // Nobody need be asked about it now.
    node.world.image.lock().layers[1].media_type.push_str("+encrypted");
    node.lazy.decide(&node.wanted_in("test", 1, "")).await;
    assert_eq!(lazy_layers(&node.decided().await), [Some(true), Some(false), Some(false)]);
    assert!(node.lazy.decider.undecided().is_empty(), "the earlier one is told no longer");
}

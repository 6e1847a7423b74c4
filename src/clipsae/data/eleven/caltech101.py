"""Caltech101: 101 kinds of objects, 40 to 800 photos each (Fei-Fei et al., 2004).

Source: https://data.caltech.edu/records/mzrjq-6wc02 (CC BY 4.0). Layout: the archive's
`101_ObjectCategories/<class>/image_0001.jpg`; some copies have the classes at once. It has no split
of its own.

The benchmark counts 100 classes, as CoOp does: neither the background's pictures nor
`Faces_easy`, which are the same faces cut out. Classes are the folders in ASCII order, capitals
first; the paper's code paired them with names in another order.
"""

from clipsae.data.eleven.base import DatasetInfo, PublishedDataset
from clipsae.data.eleven.splits import Split, split_by_rule

LEFT_OUT = ("BACKGROUND_Google", "Faces_easy")
SINGULAR = {
    "airplanes": "airplane",
    "Faces": "face",
    "Leopards": "leopard",
    "Motorbikes": "motorbike",
}

# The published 100.
CLASSES = """
Faces Leopards Motorbikes accordion airplanes anchor ant barrel bass beaver binocular bonsai brain
brontosaurus buddha butterfly camera cannon car_side ceiling_fan cellphone chair chandelier
cougar_body cougar_face crab crayfish crocodile crocodile_head cup dalmatian dollar_bill dolphin
dragonfly electric_guitar elephant emu euphonium ewer ferry flamingo flamingo_head garfield gerenuk
gramophone grand_piano hawksbill headphone hedgehog helicopter ibis inline_skate joshua_tree
kangaroo ketch lamp laptop llama lobster lotus mandolin mayfly menorah metronome minaret nautilus
octopus okapi pagoda panda pigeon pizza platypus pyramid revolver rhino rooster saxophone schooner
scissors scorpion sea_horse snoopy soccer_ball stapler starfish stegosaurus stop_sign strawberry
sunflower tick trilobite umbrella watch water_lilly wheelchair wild_cat windsor_chair wrench
yin_yang
""".split()  # noqa: SIM905 - a list would take a hundred lines


class Caltech101(PublishedDataset):
    """See the module. Without CoOp's file the split is `split_by_rule`'s."""

    about = DatasetInfo(
        name="caltech101",
        title="Caltech101",
        layout="101_ObjectCategories/<class>/<image>.jpg, better with split_zhou_Caltech101.json",
        source="https://data.caltech.edu/records/mzrjq-6wc02",
        licence="CC BY 4.0",
        classes=100,
        official=(4_128, 2_465),
        coop=(4_128, 2_465),
        split_file="split_zhou_Caltech101.json",
        prompt="a photo of a {}.",
        zero_shot=93.55,
        own_split="fixed rule",
    )
    image_folders = ("101_ObjectCategories", ".")
    published = frozenset(CLASSES)
    torchvision_class = "Caltech101"

    def official(self, split: str) -> Split:
        return split_by_rule(self.place.images, split, left_out=LEFT_OUT)

    def clean(self, raw: str) -> str:
        return super().clean(SINGULAR.get(raw, raw))

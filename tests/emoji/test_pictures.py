"""The small world is what its tables say: pictures, captions, and the judge that finds the nearest person."""

import colorsys
import random
import re
import unicodedata
from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.spatial.transform import Rotation
from scipy.stats import chi2, spearmanr

from fairref.bundle.judges import PEOPLE_SHEET, load_sprites
from fairref.emoji import stages
from fairref.emoji.captions import (
    AGE_SHARE,
    HAIR_WORDS,
    HUES,
    KINDS,
    SHARES,
    SPLITS,
    TONE_SHARE,
    colour_name,
    concepts,
    describe,
    draw_world,
    occupations,
    prompt_of,
    say,
)
from fairref.emoji.pictures import (
    AGES,
    STYLES,
    VIEWS,
    Scene,
    draw,
    face_points,
    random_scene,
)
from fairref.emoji.sheet import (
    OBJECT,
    PERSON,
    ROW,
    SIGNED,
    SKIN,
    THING,
    THING_SHEET,
    sequence,
    things,
)
from fairref.judges.sprites import (
    GENDERS,
    HAIR,
    LOOKS,
    PLAIN,
    RESOLUTION,
    SPRITE,
    TONES,
    WHITE,
    rotate_hue,
)
from fairref.judges.templates import Templates

L, G, K = len(LOOKS), len(GENDERS), len(TONES)
RARE = 1e-4  # probability below which a draw is not chance
WHO = ("look", "gender", "tone", "old")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def portraits(B, seed):
    return stages.balanced_scene(B, seeded(seed), portraits=True)


def with_person(scene, **changes):
    return replace(scene, person=replace(scene.person, **changes))


def everybody(seed=0):
    """Each person once, young, in one and the same free setting, its clothes in their own colours."""
    look, gender, tone = (i.flatten() for i in torch.meshgrid(*map(torch.arange, (L, G, K)), indexing="ij"))
    n = len(look)
    first = random_scene(look[:1], gender[:1], tone[:1], seeded(seed))[torch.zeros(n, dtype=torch.long)]
    plain = {"hue": torch.zeros(n), "light": torch.ones(n)}
    return with_person(first, look=look, gender=gender, tone=tone, **plain)


def on_picture(mask, person):
    """Masks (B, P, P) of sprites where `person` puts them, (B, R, R)."""
    zoom = 1 / person.scale
    theta = torch.zeros(len(person), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = zoom
    theta[:, :, 2] = -person.place * zoom[:, None]
    grid = F.affine_grid(theta, [len(person), 1, RESOLUTION, RESOLUTION], align_corners=False)
    return F.grid_sample(mask[:, None].float(), grid, align_corners=False)[:, 0]


@pytest.fixture(scope="module")
def people():
    """Pictures (L, G, K, 3, R, R) in [0, 1] of everybody, and masks (L, G, R, R) of what is seen."""
    scene = everybody()
    x = (draw(scene) + 1) / 2
    s, light = load_sprites(), scene.person[torch.arange(0, len(scene), K)]
    masks = {
        name: on_picture(getattr(s, name).flatten(0, 1), light).view(L, G, *x.shape[2:])
        for name in ("skin", "hair", "clothes", "alpha")
    }
    return x.view(L, G, K, *x.shape[1:]), masks


def test_the_sheet_has_every_person_and_they_differ():
    image = Image.open(PEOPLE_SHEET)
    assert image.size == (SPRITE * K, SPRITE * L * G) and image.mode == "RGBA"
    cells = (
        np.asarray(image).reshape(L * G, SPRITE, K, SPRITE, 4).transpose(0, 2, 1, 3, 4).reshape(L * G * K, -1)
    )
    assert len(np.unique(cells, axis=0)) == L * G * K
    assert L >= 12


def test_sequences_are_unicodes():
    assert (*OBJECT, *SIGNED, PLAIN) == LOOKS and tuple(PERSON) == GENDERS and tuple(SKIN) == TONES
    names = [unicodedata.name(c) for c in sequence("pilot", "woman", "medium")]
    assert names == [
        "WOMAN",
        "EMOJI MODIFIER FITZPATRICK TYPE-4",
        "ZERO WIDTH JOINER",
        "AIRPLANE",
        "VARIATION SELECTOR-16",
    ]
    names = [unicodedata.name(c) for c in sequence("police_officer", "man", "dark")]
    assert names == [
        "POLICE OFFICER",
        "EMOJI MODIFIER FITZPATRICK TYPE-6",
        "ZERO WIDTH JOINER",
        "MALE SIGN",
        "VARIATION SELECTOR-16",
    ]
    assert len({sequence(look, g, k) for look in LOOKS for g in GENDERS for k in TONES}) == L * G * K


def test_the_sheet_of_things():
    image = np.asarray(Image.open(THING_SHEET).convert("RGBA"))
    rows, names = -(-len(things()) // ROW), list(things())
    assert image.shape == (rows * THING, ROW * THING, 4)
    cells = image.reshape(rows, THING, ROW, THING, 4).transpose(0, 2, 1, 3, 4).reshape(rows * ROW, -1)
    assert len(np.unique(cells[: len(names)], axis=0)) == len(names)
    assert (cells[: len(names)].reshape(len(names), -1, 4)[:, :, 3] > 128).mean(1).min() > 0.08


def test_skin_tone_changes_skin_and_no_clothes_hair_or_background(people):
    x, masks = people
    change = (x - x[:, :, :1]).abs().sum(3).amax(2)  # (L, G, R, R), largest over the tones
    assert change[masks["alpha"] == 0].max() == 0
    assert change[masks["hair"] == 1].max() == 0
    assert change[masks["clothes"] == 1].max() < 24 / 255
    skin = masks["skin"] == 1
    for k in range(K - 1):
        step = (x[:, :, k] - x[:, :, k + 1]).abs().sum(2)  # (L, G, R, R)
        assert min(step[i, j][skin[i, j]].mean() for i in range(L) for j in range(G)) > 0.15
    assert skin.sum((2, 3)).min() > 100 and skin.float().mean() > 0.1


def test_gender_changes_the_picture(people):
    x, _ = people
    differs = (x[:, 0] - x[:, 1]).abs().sum(2) > 0.3  # (L, K, R, R)
    assert differs.float().mean((2, 3)).min() > 0.02


def test_hair_colour_changes_hair_only():
    scene = everybody()
    dark, fair = (
        draw(with_person(scene, hair=(torch.tensor(HAIR[i]) / 255).expand(len(scene), 3))) for i in (0, 3)
    )
    change = (dark - fair).abs().sum(1)
    hair = on_picture(load_sprites().hair[scene.person.look, scene.person.gender], scene.person)
    assert change[hair == 0].max() == 0
    assert change[hair == 1].min() > 0.1


def test_clothes_colour_changes_clothes_only():
    scene = everybody()
    n = len(scene)
    turned = with_person(scene, hue=torch.full((n,), 0.4), light=torch.full((n,), 0.85))
    change = (draw(scene) - draw(turned)).abs().sum(1)
    clothes = on_picture(load_sprites().clothes[scene.person.look, scene.person.gender], scene.person)
    assert change[clothes == 0].max() == 0 and change[clothes == 1].mean() > 0.1


def test_what_is_free_does_not_depend_on_who_is_seen():
    B = 512
    who = [torch.randint(n, (B,), generator=seeded(1)) for n in (L, G, K)]
    one = random_scene(*who, seeded(2))
    other = random_scene(*(torch.zeros(B, dtype=torch.long) for _ in who), seeded(2))
    for f in fields(Scene):
        if f.name not in ("person", "friend"):
            assert torch.equal(getattr(one, f.name), getattr(other, f.name)), f.name
    for f in fields(one.person):
        if f.name not in WHO:
            assert torch.equal(getattr(one.person, f.name), getattr(other.person, f.name)), f.name
    assert not torch.equal(one.person.hair, random_scene(*who, seeded(3)).person.hair)


def test_every_hair_colour_is_drawn_alike_and_old_people_have_white_hair():
    n = torch.zeros(4000, dtype=torch.long)  # health workers, whose hair shows
    hair = random_scene(n, n, n, seeded(4)).person.hair
    # brightness is jittered
    nearest = F.normalize(hair, dim=1) @ F.normalize(torch.tensor(HAIR).float(), dim=1).T
    count = torch.bincount(nearest.argmax(1), minlength=len(HAIR))
    assert ((count - 1000.0).square() / 1000).sum() < chi2.isf(RARE, len(HAIR) - 1)
    old = random_scene(n, n, n, seeded(4), old=n + 1).person
    assert (old.old == 1).all() and (old.hair - torch.tensor(WHITE) / 255).abs().max() < 0.1


def test_age_shows_where_hair_does():
    aged = {look for look, there in zip(LOOKS, load_sprites().aged.tolist(), strict=True) if there}
    assert {"teacher", "judge", "singer", PLAIN} <= aged and not aged & {
        "cook",
        "construction_worker",
        "pilot",
    }
    look = torch.arange(L)
    zero = torch.zeros_like(look)
    person = random_scene(look, zero, zero, seeded(4), old=zero + 1).person
    assert {LOOKS[i] for i in person.old.nonzero()[:, 0].tolist()} == aged


def test_pictures_are_in_range_and_people_differ_in_place_and_background():
    x = draw(portraits(64, 5))
    assert x.shape == (64, 3, RESOLUTION, RESOLUTION) and x.dtype == torch.float32
    assert x.min() >= -1 - 1e-6 and x.max() <= 1 + 1e-6
    assert x[:, :, 0].std(0).min() > 0.05  # the top row is background


def test_a_picture_is_the_same_in_whatever_batch():
    """A product of matrices may add in another order in another batch: a place is then some eps of float32 away, of
    RESOLUTION pixels, between two of which a value changes by 2 at most. A step of 8 bits is 250 times as large."""
    close = {"rtol": 0, "atol": 2 * RESOLUTION * 2 * torch.finfo(torch.float32).eps}
    scene = stages.balanced_scene(48, seeded(6))
    whole = draw(scene)
    for size in (1, 5):
        parts = [draw(scene[part]) for part in torch.arange(len(scene)).split(size)]
        torch.testing.assert_close(torch.cat(parts), whole, **close)
    assert torch.equal(whole, draw(stages.balanced_scene(48, seeded(6))))
    assert not torch.equal(whole, draw(stages.balanced_scene(48, seeded(7))))


def test_faces_are_where_the_skin_is():
    scene = everybody()
    person = scene.person
    boxes, points = face_points(person)
    skin = on_picture(load_sprites().skin[person.look, person.gender], person) > 0.5
    at = points.long()
    for b in range(len(scene)):
        left, top, right, bottom = boxes[b].round().long().tolist()
        face = skin[b, top:bottom, left:right].float().mean()
        assert face > (0.2 if LOOKS[person.look[b]] in ("technologist", "scientist") else 0.5), LOOKS[
            person.look[b]
        ]
        x, y = at[b, 2].tolist()
        assert skin[b, y - 1 : y + 2, x - 1 : x + 2].any()  # the nose
    light = draw(scene).mean(1)
    eyes = torch.stack([light[torch.arange(len(scene)), at[:, i, 1], at[:, i, 0]] for i in (0, 1)])
    cheek = light[torch.arange(len(scene)), at[:, 2, 1], at[:, 0, 0]]
    seen = person.look != LOOKS.index("scientist")  # who wears goggles
    darker = (eyes < cheek - 0.1)[:, seen & (person.tone < 2)]
    assert darker.float().mean() > 0.9, [
        LOOKS[i] for i in person.look[seen & (person.tone < 2)][~darker.all(0)]
    ]


def test_views():
    B = 400
    view = torch.arange(B) % len(VIEWS)
    look, gender, tone = (torch.randint(n, (B,), generator=seeded(21)) for n in (L, G, K))
    scene = random_scene(look, gender, tone, seeded(22), view=view)
    boxes, _ = face_points(scene.person)
    friends, _ = face_points(scene.friend)
    side, other = (boxes[:, 2] - boxes[:, 0], friends[:, 2] - friends[:, 0])
    pair = view == VIEWS.index("pair")
    assert (side > other)[pair].all()  # the largest face is the one that the caption is about
    for those in (boxes[scene.shown], friends[pair]):
        assert those.min() > -4 and those.max() < RESOLUTION + 4
    assert side[view == VIEWS.index("far")].max() < side[view == 0].min()
    alone = draw(scene)[~scene.shown]
    again = draw(with_person(scene, look=(look + 1) % L))[~scene.shown]
    assert torch.equal(alone, again)  # nobody is nobody


@pytest.mark.parametrize("style", STYLES[1:])
def test_styles_change_the_picture_and_only_it(style):
    scene = portraits(24, 23)
    plain, styled = draw(scene), draw(replace(scene, style=torch.full_like(scene.style, STYLES.index(style))))
    assert styled.min() >= -1 and styled.max() <= 1
    assert (plain - styled).abs().mean((1, 2, 3)).min() > 0.02
    if style in ("grey", "outline"):
        assert (styled - styled.mean(1, keepdim=True)).abs().max() < 1e-5


def test_hue_is_a_rotation_about_grey():
    angle = torch.linspace(-3, 3, 13, dtype=torch.float64)
    axis = np.ones(3) / 3**0.5
    expected = Rotation.from_rotvec(angle.numpy()[:, None] * axis).as_matrix()
    torch.testing.assert_close(rotate_hue(angle), torch.from_numpy(expected), rtol=0, atol=1e-12)


def test_occupations():
    jobs = occupations()
    names = [job.name for job in jobs]
    assert len(names) >= 200 and len(set(names)) == len(names)
    count = Counter(job.split for job in jobs)
    assert set(count) == set(SPLITS)
    assert count["train"] >= 150 and count["validation"] >= 12 and count["test"] >= 50
    assert all(0 <= job.share_women <= 1 for job in jobs)
    assert {job.look for job in jobs} == set(LOOKS) - {PLAIN}
    for split in ("train", "test"):  # validation has fewer names than there are looks
        assert {job.look for job in jobs if job.split == split} == set(LOOKS) - {PLAIN}
    assert set(Counter(job.look for job in jobs).values()) <= set(range(11, 17))
    for look in LOOKS[:-1]:  # or the look would give the gender away
        assert 0.4 < np.mean([job.share_women > 0.5 for job in jobs if job.look == look]) < 0.6, look


@pytest.mark.parametrize("split", [None, *SPLITS])
def test_the_shares_are_balanced_over_all_and_biased_each(split):
    share = np.array([job.share_women for job in occupations() if split in (None, job.split)])
    assert abs(share.mean() - 0.5) < 0.02
    assert 0.4 < (share > 0.5).mean() < 0.6
    assert abs(2 * share - 1).mean() > 0.5  # the bias of a model that draws these shares


@pytest.fixture(scope="module")
def drawn():
    """40,000 captions and their scenes."""
    return draw_world(40_000, seeded(8))


def named_by(text):
    """(gender, tone, age) that an English reader finds in a caption, None for none."""
    gender = re.search(r"\b(woman|female|man|male)\b", text)
    tone = re.search(r"([\w-]+)-skinned", text)
    old = re.search(r"\b(young|old|elderly)\b", text)
    return (
        gender and {"female": "woman", "male": "man"}.get(gender[0], gender[0]),
        tone and tone[1],
        old and {"elderly": "old"}.get(old[0], old[0]),
    )


@pytest.mark.slow
def test_captions_that_name_nothing_follow_the_tables(drawn):
    said, scene = drawn
    person, jobs = scene.person, {job.name: n for n, job in enumerate(occupations())}
    neutral = torch.tensor([s.gender < 0 and s.occupation != "" for s in said])
    job = np.array([jobs.get(s.occupation, 0) for s in said])[neutral]
    woman = (person.gender[neutral] == GENDERS.index("woman")).numpy()
    n = np.bincount(job, minlength=len(jobs))
    women = np.bincount(job, weights=woman, minlength=len(jobs))
    p = np.array([o.share_women for o in occupations()])
    assert n.min() > 50
    assert ((women - n * p) ** 2 / (n * p * (1 - p))).sum() < chi2.isf(RARE, len(jobs))
    assert spearmanr(women / n, p).statistic > 0.97
    aged = load_sprites().aged[person.look] & torch.tensor([s.old < 0 for s in said])
    for values, free, share in (
        (person.tone, torch.tensor([s.tone < 0 for s in said]), TONE_SHARE),
        (person.old, aged, AGE_SHARE),
    ):
        count = torch.bincount(values[free], minlength=len(share)).numpy()
        expected = free.sum().item() * np.array(share)
        assert ((count - expected) ** 2 / expected).sum() < chi2.isf(RARE, len(share) - 1)


def test_captions_get_what_they_say(drawn):
    said, scene = drawn
    person, seen = scene.person, Counter()
    shown = (person.gender.tolist(), person.tone.tolist(), person.old.tolist())
    names = (GENDERS, TONES, AGES)
    looks = {job.name: job.look for job in occupations()}
    for b, s in enumerate(said):
        told = named_by(s.text)
        assert all(t in (None, n[v[b]]) for t, n, v in zip(told, names, shown, strict=True)), s.text
        assert [t is not None for t in told] == [v >= 0 for v in (s.gender, s.tone, s.old)], s.text
        seen[tuple(t is not None for t in told)] += 1
        if s.occupation:
            assert LOOKS[person.look[b]] == looks[s.occupation] and (s.occupation in s.text or not s.text)
        view = VIEWS[scene.view[b]]
        assert ("far away" in s.text) == (view == "far") and ("a friend" in s.text) == (view == "pair")
        assert ("nobody" in s.text) == (view == "nobody")
        assert view != "nobody" or scene.thing[b] >= 0
    assert len(seen) == 8  # every combination of names


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_concepts_are_shown(drawn, kind):
    said, scene = drawn
    rows = {c.phrase: c for c in concepts(kind)}
    seen = set()
    for b, s in enumerate(said):
        phrase = next((p for p in rows if re.search(rf"(person,? {p}$|\b{p} person)", s.text)), None)
        if phrase is None:
            continue
        seen.add(phrase)
        if kind == "style":
            assert STYLES[scene.style[b]] == rows[phrase].thing
        else:
            assert list(things())[scene.thing[b]] == rows[phrase].thing
        assert (LOOKS[scene.person.look[b]] == PLAIN) == (kind in ("activity", "descriptor"))
    assert seen == set(rows)


@pytest.mark.parametrize("stage", SHARES)
def test_kinds_are_drawn_as_often_as_they_should(stage):
    assert sum(SHARES[stage].values()) == pytest.approx(1)
    rng = random.Random(1)
    said = [say(rng, stage) for _ in range(4000)]
    empty = sum(not s.text for s in said) / 4000
    assert empty == pytest.approx(SHARES[stage].get("empty", 0), abs=0.02)
    neutral = sum(bool(s.text) and max(s.gender, s.tone, s.old) < 0 for s in said) / 4000
    assert neutral > (0.1 if stage == "clip" else 0.4)


@pytest.mark.slow
def test_the_prompts_of_finetuning_are_captions():
    rng = random.Random(2)
    texts = {say(rng, "first").text for _ in range(60_000)}
    assert {f"a photo of the face of a {job.name}, a person" for job in occupations()} <= texts
    for kind in ("activity", "descriptor"):
        assert {prompt_of(c) for c in concepts(kind)} <= texts


@pytest.mark.slow
def test_no_caption_is_cut(tmp_path):
    tokenizer = stages.read_tokenizer(tmp_path)
    texts = describe(*draw_world(4000, seeded(9), "clip"), seeded(9))
    assert not any(tokenizer.cut(texts))
    assert tokenizer(texts).shape == (len(texts), 77)


def test_descriptions_are_true():
    said, scene = draw_world(600, seeded(10), "clip")
    texts, named = describe(said, scene, seeded(11)), Counter()
    for b, text in enumerate(texts):
        assert text.startswith(said[b].text)
        if hair := re.search(r"with (\w+) hair", text):
            colours = np.array((*HAIR, WHITE))
            distance = np.abs(scene.person.hair[b].numpy() * 255 - colours).sum(1)
            assert HAIR_WORDS.index(hair[1]) == int(np.argmin(distance))
        if background := re.search(r"in front of a (\w+) background", text):
            h, s, _ = colorsys.rgb_to_hsv(*scene.background[b].mean(0).tolist())
            assert background[1] == ("grey" if s < 0.15 else HUES[round(h * 6) % 6])
        named.update({"hair": bool(hair), "background": bool(background)})
    assert all(150 < n < 420 for n in named.values())


@pytest.mark.parametrize(
    "rgb, name",
    [
        ((1, 0, 0), "red"),
        ((0, 1, 0), "green"),
        ((0.1, 0.1, 0.9), "blue"),
        ((0.9, 0.1, 0.3), "red"),
        ((0.5, 0.5, 0.52), "grey"),
    ],
)
def test_colour_names(rgb, name):
    assert colour_name(torch.tensor(rgb, dtype=torch.float)) == name


@pytest.fixture(scope="module")
def judged():
    """A judge with the threshold that one real picture in 100 exceeds; 256 of them, scene and x."""
    judge = Templates(load_sprites(), 0.0)
    scene = portraits(256, 12)
    x = draw(scene)
    with torch.no_grad():
        judge.threshold = judge(x)["error"].quantile(0.99).item()
    return judge, scene, x


def truth_of(scene):
    person = scene.person
    return {"look": person.look, "gender": person.gender, "skin_tone": person.tone, "age": person.old}


def test_the_judge_finds_who_is_seen_and_where(judged):
    judge, scene, x = judged
    found = judge(x)
    for name, truth in truth_of(scene).items():
        known = found["age_known"] if name == "age" else slice(None)
        assert (found[name] == truth)[known].float().mean() >= 0.98, name
    assert found["none"].float().mean() < 0.02
    assert torch.equal(found["age_known"], found["skin_tone_known"] & load_sprites().aged[found["look"]])
    off = (found["place"] - scene.person.place).abs() * RESOLUTION / 2
    assert off.mean() < 0.8 and (found["scale"] - scene.person.scale).abs().max() < 0.08


def test_the_judge_finds_who_is_seen_in_soft_and_noisy_pictures(judged):
    judge, scene, x = judged
    soft = F.interpolate(F.avg_pool2d(x[:192], 2), scale_factor=2, mode="bilinear")
    found = judge(soft + 0.1 * torch.randn(soft.shape, generator=seeded(13)))
    # blurred outlines darken the two light tones, which lie closest together
    for name, bar in (("look", 0.98), ("gender", 0.98), ("skin_tone", 0.95)):
        assert (found[name] == truth_of(scene)[name][:192]).float().mean() >= bar, name


def test_colours_are_those_of_background_and_clothes(judged):
    judge, scene, x = judged
    part = torch.arange(96)
    scene, x = scene[part], x[part]
    found = judge(x)
    colours = judge.colours(x, found)
    plain = scene.person.look == LOOKS.index(PLAIN)
    assert (colours["clothes"].isnan().all(1) | found["none"] | ~plain).all()
    assert colours["clothes"][~plain & ~found["none"]].isfinite().float().mean() > 0.9
    off = colours["background"] - (scene.background.mean(1) * 2 - 1)
    assert off.abs().nanmean() < 0.05
    dressed = with_person(scene, light=scene.person.light * 0.8)
    moved = replace(scene, background=1 - scene.background)
    for name, changed, other in (("clothes", dressed, "background"), ("background", moved, "clothes")):
        again = judge.colours(draw(changed), found)
        assert (again[name] - colours[name]).abs().nanmean() > 0.05, name
        assert (again[other] - colours[other]).abs().nanmean() < 0.02, other


def test_things_in_the_corners_change_nothing(judged):
    judge, scene, _ = judged
    clear = replace(scene, thing=torch.full_like(scene.thing, -1))[torch.arange(64)]
    thing = replace(clear, thing=torch.arange(64) % len(things()))
    a, b = judge(draw(clear)), judge(draw(thing))
    assert torch.equal(a["gender"], b["gender"]) and torch.equal(a["skin_tone"], b["skin_tone"])


def test_what_shows_no_upright_person_is_nobody(judged):
    judge, _, x = judged
    noise = torch.rand(32, 3, RESOLUTION, RESOLUTION, generator=seeded(14)) * 2 - 1
    for other in (noise, x[:96].flip(2), -x[:96]):
        assert judge(other)["none"].float().mean() > 0.95


@pytest.fixture(scope="module")
def blends(judged):
    """What the judge says of two parts and of their mean: one look in both genders, and two people."""
    judge, scene, x = judged
    other = with_person(scene, gender=1 - scene.person.gender)[torch.arange(96)]
    pairs = {"genders": (x[:96], draw(other)), "people": (x[:96], x[96:192])}
    return {name: (judge(a), judge(b), judge((a + b) / 2)) for name, (a, b) in pairs.items()}


@pytest.mark.parametrize("kind", ["genders", "people"])
def test_a_blend_is_further_from_everybody_than_its_parts(blends, kind):
    a, b, blend = (found["error"] for found in blends[kind])
    assert (blend > torch.maximum(a, b)).float().mean() > 0.9


@pytest.mark.parametrize("kind", ["genders", "people"])
def test_a_blend_is_nobody(blends, kind):
    assert blends[kind][2]["none"].float().mean() > 0.9


def test_a_blend_of_genders_has_a_tone(judged, blends):
    _, scene, _ = judged
    blend = blends["genders"][2]
    known = blend["skin_tone_known"]
    assert not torch.equal(known, blend["gender_known"]) and known.float().mean() > 0.5
    assert (blend["skin_tone"] == scene.person.tone[:96])[known].float().mean() > 0.95


def test_the_share_is_how_much_of_each_gender_is_seen(judged):
    judge, scene, x = judged
    other = draw(with_person(scene, gender=1 - scene.person.gender))
    for part in (0.0, 0.1, 0.2):
        found = judge((1 - part) * x + part * other)
        assert (found["gender"] == scene.person.gender).float().mean() > 0.98
        # 0.97: outlines are soft
        assert found["share"].median().item() == pytest.approx(0.97 - part, abs=0.03)


def test_a_share_is_stretched_about_a_half(judged):
    """What is m of its own gender to a judge that was told nothing is all of it to one that was told m."""
    judge, _, x = judged
    m = 0.8
    told = Templates(load_sprites(), judge.threshold, dict.fromkeys(LOOKS, m))
    plain, stretched = judge(x[:64])["share"], told(x[:64])["share"]
    torch.testing.assert_close((stretched - 0.5) * (m - 0.5) / 0.5, plain - 0.5, rtol=1e-4, atol=1e-5)
    assert (stretched > plain).all()


def test_an_empty_picture_is_nobody(judged):
    judge, scene, _ = judged
    away = with_person(scene, place=torch.full_like(scene.person.place, 3.0))[torch.arange(96)]
    found = judge(draw(away))
    assert found["none"].all() and not (found["gender_known"] | found["skin_tone_known"]).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_judge_sees_pictures_of_any_precision(judged, dtype):
    judge, _, x = judged
    found, expected = judge(x[:40].to(dtype)), judge(x[:40])
    for name in ("look", "gender", "skin_tone", "age"):
        assert torch.equal(found[name], expected[name])


def test_a_picture_that_is_not_finite_is_nobody(judged):
    judge, _, x = judged
    broken = x[:2].clone()
    broken[0, 0, 0, 0], broken[1] = torch.inf, torch.nan
    assert judge(broken)["none"].all()


def test_the_judge_is_the_same_in_whatever_batch(judged):
    judge, _, x = judged
    whole = judge(x[:40])
    alone = [judge(x[i : i + 1]) for i in range(0, 40, 13)]
    for name in ("look", "gender", "skin_tone", "none"):
        assert torch.cat([a[name] for a in alone]).tolist() == whole[name][::13].tolist()
    torch.testing.assert_close(
        torch.cat([a["error"] for a in alone]), whole["error"][::13], rtol=1e-4, atol=1e-5
    )
    assert all(len(part) == 0 for part in judge(x[:0]).values())

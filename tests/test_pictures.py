"""The small world is what its tables say: pictures, captions, and the judge that finds the nearest person."""

import colorsys
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

from fairref.emoji import stages
from fairref.emoji.captions import (
    HAIR_WORDS,
    HUES,
    SHARES,
    SPLITS,
    TONE_SHARE,
    captions,
    colour_name,
    describe,
    draw_captions,
    occupations,
)
from fairref.emoji.pictures import HAIR, RESOLUTION, Scene, draw, random_scene, rotate_hue, sprites
from fairref.emoji.sheet import GENDERS, LOOKS, SHEET, SPRITE, TONES, sequence
from fairref.emoji.templates import Templates
from fairref.errors import UserError

L, G, K = len(LOOKS), len(GENDERS), len(TONES)
RARE = 1e-4  # probability below which a draw is not chance


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def everybody(seed=0):
    """Each person once, in one and the same free setting, its clothes in their own colours."""
    look, gender, tone = (i.flatten() for i in torch.meshgrid(*map(torch.arange, (L, G, K)), indexing="ij"))
    first = random_scene(look[:1], gender[:1], tone[:1], seeded(seed))
    free = {
        f.name: getattr(first, f.name).expand(len(look), *getattr(first, f.name).shape[1:])
        for f in fields(Scene)[3:]
    }
    plain = {"hue": torch.zeros(len(look)), "light": torch.ones(len(look))}
    return Scene(look, gender, tone, **{**free, **plain})


def on_picture(mask, scene):
    """Masks (B, P, P) of sprites where `scene` puts them, (B, R, R)."""
    zoom = 1 / scene.scale
    theta = torch.zeros(len(scene), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = zoom
    theta[:, :, 2] = -scene.place * zoom[:, None]
    grid = F.affine_grid(theta, [len(scene), 1, RESOLUTION, RESOLUTION], align_corners=False)
    return F.grid_sample(mask[:, None].float(), grid, align_corners=False)[:, 0]


@pytest.fixture(scope="module")
def people():
    """Pictures (L, G, K, 3, R, R) in [0, 1] of everybody, and masks (L, G, R, R) of what is seen."""
    scene = everybody()
    x = (draw(scene) + 1) / 2
    s, light = sprites(), scene[torch.arange(0, len(scene), K)]
    masks = {
        name: on_picture(getattr(s, name).flatten(0, 1), light).view(L, G, *x.shape[2:])
        for name in ("skin", "hair", "clothes", "alpha")
    }
    return x.view(L, G, K, *x.shape[1:]), masks


def test_the_sheet_has_every_person_and_they_differ():
    image = Image.open(SHEET)
    assert image.size == (SPRITE * K, SPRITE * L * G) and image.mode == "RGBA"
    cells = (
        np.asarray(image).reshape(L * G, SPRITE, K, SPRITE, 4).transpose(0, 2, 1, 3, 4).reshape(L * G * K, -1)
    )
    assert len(np.unique(cells, axis=0)) == L * G * K
    assert L >= 12


def test_sequences_are_unicodes():
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
        draw(replace(scene, hair=(torch.tensor(HAIR[i]) / 255).expand(len(scene), 3))) for i in (0, 3)
    )
    change = (dark - fair).abs().sum(1)
    hair = on_picture(sprites().hair[scene.look, scene.gender], scene)
    assert change[hair == 0].max() == 0
    assert change[hair == 1].min() > 0.1


def test_clothes_colour_changes_clothes_only():
    scene = everybody()
    turned = replace(scene, hue=torch.full_like(scene.hue, 0.4), light=torch.full_like(scene.light, 0.85))
    change = (draw(scene) - draw(turned)).abs().sum(1)
    clothes = on_picture(sprites().clothes[scene.look, scene.gender], scene)
    assert change[clothes == 0].max() == 0 and change[clothes == 1].mean() > 0.1


def test_what_is_free_does_not_depend_on_who_is_seen():
    B = 512
    who = [torch.randint(n, (B,), generator=seeded(1)) for n in (L, G, K)]
    one = random_scene(*who, seeded(2))
    other = random_scene(*(torch.zeros(B, dtype=torch.long) for _ in who), seeded(2))
    for f in fields(Scene)[3:]:
        assert torch.equal(getattr(one, f.name), getattr(other, f.name)), f.name
    assert not torch.equal(one.hair, random_scene(*who, seeded(3)).hair)


def test_every_hair_colour_is_drawn_alike():
    n = torch.zeros(4000, dtype=torch.long)
    hair = random_scene(n, n, n, seeded(4)).hair
    nearest = (
        F.normalize(hair, dim=1) @ F.normalize(torch.tensor(HAIR).float(), dim=1).T
    )  # brightness is jittered
    count = torch.bincount(nearest.argmax(1), minlength=len(HAIR))
    assert ((count - 1000.0).square() / 1000).sum() < chi2.isf(RARE, len(HAIR) - 1)


def test_pictures_are_in_range_and_people_differ_in_place_and_background():
    x = draw(stages.balanced_scene(64, seeded(5)))
    assert x.shape == (64, 3, RESOLUTION, RESOLUTION) and x.dtype == torch.float32
    assert x.min() >= -1 - 1e-6 and x.max() <= 1 + 1e-6
    assert x[:, :, 0].std(0).min() > 0.05  # the top row is background


def test_a_picture_is_the_same_in_whatever_batch():
    scene = stages.balanced_scene(48, seeded(6))
    whole = draw(scene)
    for size in (1, 5):
        parts = [draw(scene[part]) for part in torch.arange(len(scene)).split(size)]
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(whole, draw(stages.balanced_scene(48, seeded(6))))
    assert not torch.equal(whole, draw(stages.balanced_scene(48, seeded(7))))


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
    assert {job.look for job in jobs} == set(LOOKS)
    for split in ("train", "test"):  # validation has fewer names than there are looks
        assert {job.look for job in jobs if job.split == split} == set(LOOKS)
    assert set(Counter(job.look for job in jobs).values()) <= set(range(11, 17))
    for look in LOOKS:  # or the look would give the gender away
        assert 0.4 < np.mean([job.share_women > 0.5 for job in jobs if job.look == look]) < 0.6, look


@pytest.mark.parametrize("split", [None, *SPLITS])
def test_the_shares_are_balanced_over_all_and_biased_each(split):
    share = np.array([job.share_women for job in occupations() if split in (None, job.split)])
    assert abs(share.mean() - 0.5) < 0.02
    assert 0.4 < (share > 0.5).mean() < 0.6
    assert abs(2 * share - 1).mean() > 0.5  # the bias of a model that draws these shares


@pytest.fixture(scope="module")
def drawn():
    """100,000 draws: caption index, look, gender, tone."""
    return draw_captions(100_000, seeded(8))


def test_neutral_captions_follow_the_table(drawn):
    index, _, gender, tone = drawn
    table, jobs = captions(), occupations()
    neutral = (table.gender[index] < 0) & (table.tone[index] < 0) & (table.occupation[index] >= 0)
    job, woman = table.occupation[index][neutral].numpy(), (gender[neutral] == GENDERS.index("woman")).numpy()
    n = np.bincount(job, minlength=len(jobs))
    women = np.bincount(job, weights=woman, minlength=len(jobs))
    p = np.array([o.share_women for o in jobs])
    assert n.min() > 150
    assert ((women - n * p) ** 2 / (n * p * (1 - p))).sum() < chi2.isf(RARE, len(jobs))
    assert spearmanr(women / n, p).statistic > 0.98
    count = torch.bincount(tone[neutral], minlength=K).numpy()
    expected = neutral.sum().item() * np.array(TONE_SHARE)
    assert ((count - expected) ** 2 / expected).sum() < chi2.isf(RARE, K - 1)


def named_by(text):
    """(gender, tone) that an English reader finds in a caption, None for neither."""
    gender = (
        "woman"
        if re.search(r"\b(woman|female)\b", text)
        else "man"
        if re.search(r"\b(man|male)\b", text)
        else None
    )
    tone = re.search(r"([\w-]+)-skinned|with ([\w-]+) skin", text)
    return gender, tone and (tone[1] or tone[2])


def test_captions_that_name_an_attribute_get_it(drawn):
    index, look, gender, tone = (part.tolist() for part in drawn)
    texts, seen = captions().texts, Counter()
    for i, g, k in zip(index, gender, tone, strict=True):
        named_gender, named_tone = named_by(texts[i])
        assert named_gender in (None, GENDERS[g]) and named_tone in (None, TONES[k]), texts[i]
        seen[named_gender, named_tone] += 1
    assert set(seen) == {(g, k) for g in (None, *GENDERS) for k in (None, *TONES)}
    looks = {job.name: job.look for job in occupations()}
    for i, lo in list(zip(index, look, strict=True))[:3000]:
        job = captions().occupation[i]
        assert job < 0 or LOOKS[lo] == looks[occupations()[job].name] and occupations()[job].name in texts[i]


@pytest.mark.parametrize("stage", SHARES)
def test_the_table_of_captions(stage):
    table = captions(stage)
    assert table.texts == captions().texts
    assert table.weight.sum().item() == pytest.approx(1, abs=1e-5)
    neutral = (table.gender < 0) & (table.tone < 0) & (table.occupation >= 0)
    assert table.weight[neutral].sum() > 0.5  # mostly neutral
    assert table.weight[[not text for text in table.texts]].sum() == pytest.approx(0.1)  # for guidance
    for i in np.random.default_rng(0).choice(len(table.texts), 500):
        g, k = table.gender[i].item(), table.tone[i].item()
        assert named_by(table.texts[i]) == (None if g < 0 else GENDERS[g], None if k < 0 else TONES[k])
    prompts = {f"a photo of the face of a {job.name}, a person" for job in occupations()}
    assert prompts <= set(table.texts)


def test_no_caption_is_cut(tmp_path):
    tokenizer = stages.read_tokenizer(tmp_path)
    texts = [*captions().texts, *describe(stages.balanced_scene(1000, seeded(9)), seeded(9)).texts]
    assert not any(tokenizer.cut(texts))
    assert tokenizer(texts).shape == (len(texts), 77)


def test_descriptions_are_true():
    scene = stages.balanced_scene(400, seeded(10))
    said = describe(scene, seeded(11))
    texts = said.texts
    looks, named = {job.name: job.look for job in occupations()}, Counter()
    for b, text in enumerate(texts):
        gender, tone = named_by(text)
        assert gender in (None, GENDERS[scene.gender[b]]) and tone in (None, TONES[scene.tone[b]])
        assert said.gender[b] == (-1 if gender is None else scene.gender[b])
        assert said.tone[b] == (-1 if tone is None else scene.tone[b])
        job = max((name for name in looks if re.search(rf"\b{name}, a person", text)), key=len)
        assert looks[job] == LOOKS[scene.look[b]]
        if hair := re.search(r"with (\w+) hair", text):
            distance = [np.abs(scene.hair[b].numpy() * 255 - c).sum() for c in np.array(HAIR)]
            assert HAIR_WORDS.index(hair[1]) == int(np.argmin(distance))
        if background := re.search(r"in front of a (\w+) background", text):
            h, s, _ = colorsys.rgb_to_hsv(*scene.background[b].mean(0).tolist())
            assert background[1] == ("grey" if s < 0.15 else HUES[round(h * 6) % 6])
        named.update(
            {"gender": bool(gender), "tone": bool(tone), "hair": bool(hair), "background": bool(background)}
        )
    assert all(160 < n < 320 for n in named.values())


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
    judge = Templates(0.0)
    scene = stages.balanced_scene(256, seeded(12))
    x = draw(scene)
    with torch.no_grad():
        judge.threshold = judge(x)["error"].quantile(0.99).item()
    return judge, scene, x


def test_the_judge_finds_who_is_seen(judged):
    judge, scene, x = judged
    found = judge(x)
    for name, truth in (("look", scene.look), ("gender", scene.gender), ("skin_tone", scene.tone)):
        assert (found[name] == truth).float().mean() >= 0.98, name
    assert found["none"].float().mean() < 0.02


def test_the_judge_finds_who_is_seen_in_soft_and_noisy_pictures(judged):
    judge, scene, x = judged
    soft = F.interpolate(F.avg_pool2d(x[:192], 2), scale_factor=2, mode="bilinear")
    found = judge(soft + 0.1 * torch.randn(soft.shape, generator=seeded(13)))
    # blurred outlines darken the two light tones, which lie closest together
    for name, truth, bar in (
        ("look", scene.look, 0.98),
        ("gender", scene.gender, 0.98),
        ("skin_tone", scene.tone, 0.95),
    ):
        assert (found[name] == truth[:192]).float().mean() >= bar, name


def test_what_shows_no_upright_person_is_nobody(judged):
    judge, _, x = judged
    noise = torch.rand(32, 3, RESOLUTION, RESOLUTION, generator=seeded(14)) * 2 - 1
    for other in (noise, x[:96].flip(2), -x[:96]):
        assert judge(other)["none"].float().mean() > 0.95


@pytest.fixture(scope="module")
def blends(judged):
    """What the judge says of two parts and of their mean: one look in both genders, and two people."""
    judge, scene, x = judged
    other = replace(scene, gender=1 - scene.gender)[torch.arange(96)]
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
    assert (blend["skin_tone"] == scene.tone[:96])[known].float().mean() > 0.95


def test_the_share_is_how_much_of_each_gender_is_seen(judged):
    judge, scene, x = judged
    other = draw(replace(scene, gender=1 - scene.gender))
    for part in (0.0, 0.1, 0.2):
        found = judge((1 - part) * x + part * other)
        assert (found["gender"] == scene.gender).float().mean() > 0.98
        assert found["share"].median().item() == pytest.approx(
            0.97 - part, abs=0.03
        )  # 0.97: outlines are soft


def test_an_empty_picture_is_nobody(judged):
    judge, scene, _ = judged
    away = replace(scene, place=torch.full_like(scene.place, 3.0))[torch.arange(96)]  # the background alone
    found = judge(draw(away))
    assert found["none"].all() and not (found["gender_known"] | found["skin_tone_known"]).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_judge_sees_pictures_of_any_precision(judged, dtype):
    judge, _, x = judged
    found, expected = judge(x[:40].to(dtype)), judge(x[:40])
    for name in ("look", "gender", "skin_tone"):
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


def test_the_judges_file(tmp_path):
    path = tmp_path / "templates.json"
    path.write_text('{"threshold": 0.25}')
    assert Templates.from_file(path).threshold == 0.25
    for content in ("{}", "[]", "no json", '{"threshold": null}'):
        path.write_text(content)
        with pytest.raises(UserError, match=r"templates\.json"):
            Templates.from_file(path)
    with pytest.raises(UserError, match="absent"):
        Templates.from_file(tmp_path / "absent.json")

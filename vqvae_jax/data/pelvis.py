"""Draws T2-like coronal slices of a procedural pelvis.

Each case is one 3-D geometry in millimetres: `u` is the distance from the midline (both sides are drawn at
once), `y` runs from head to foot, `z` from back to front; the origin lies midway between the femoral heads.
A structure is a signed distance (negative inside), painted over what was painted before it. `render_slice`
reads from top to bottom in that order. Bare numbers in the painting functions are places and widths in mm or
shares of a tissue's intensity, set by eye beside HipMRI's coronal slices.
"""

import functools
import math

import numpy as np

from vqvae_jax.errors import ConfigError

FIELD_OF_VIEW = (400.0, 200.0)  # mm, left to right and head to foot
CENTRE_Z, HALF_DEPTH = -3.0, 50.0  # mm; position -1 is behind the ischium, +1 in the pubic symphysis
POINT_SPREAD = 3.6  # mm; HipMRI's coronal slices are no sharper than this, whatever the pixel
WARP, WOBBLE = 3.5, 0.9  # mm; standard deviations of the broad and the fine displacements
MARGIN = 8.0  # mm; beyond it no seam, wall or soft edge of a structure shows
BRIGHTEST = 600.0  # urine, in scanner units

# T2-weighted intensities in scanner units, by eye from HipMRI.
TISSUE = {
    "fat": 345.0,
    "septum": 205.0,
    "skin": 170.0,
    "muscle": 92.0,
    "marrow": 315.0,
    "shaft marrow": 330.0,
    "cortex": 34.0,
    "cartilage": 70.0,
    "urine": BRIGHTEST,
    "bladder wall": 62.0,
    "peripheral zone": 350.0,
    "central gland": 185.0,
    "capsule": 80.0,
    "bowel wall": 120.0,
    "gas": 14.0,
    "stool": 150.0,
    "bowel fluid": 420.0,
    "vessel": 30.0,
    "erectile": 150.0,
}

# Painted in this order. name: start and end (u, y, z), radius at each; stretch back to front; fibre field.
MUSCLES = {
    "gluteus maximus": (((52, -66, -84), (118, 66, -66), 36, 40), 1.2, "oblique"),
    "piriformis": (((30, -55, -66), (118, -14, -24), 13, 7), 1.0, "oblique"),
    "iliacus": (((92, -125, 14), (84, -25, 34), 27, 16), 1.8, "steep"),
    "psoas": (((60, -125, 10), (80, 0, 38), 21, 16), 1.4, "steep"),
    "adductor mass": (((42, 42, 16), (84, 130, 4), 20, 48), 1.3, "oblique"),
    "thigh mass": (((122, 78, 0), (112, 150, 0), 22, 48), 1.4, "steep"),
    "adductor magnus": (((36, 78, -14), (84, 150, -22), 18, 28), 1.6, "oblique"),
    "hamstrings": (((62, 74, -46), (88, 150, -52), 13, 24), 1.2, "steep"),
    "quadratus femoris": (((66, 52, -32), (112, 58, -26), 15, 13), 1.0, "oblique"),
    "obturator internus": (((58, -22, -6), (52, 44, -14), 8, 10), 2.6, "steep"),
    "obturator externus": (((32, 36, 18), (104, 36, -18), 15, 11), 1.4, "oblique"),
    "adductor brevis": (((22, 46, 24), (90, 122, -2), 13, 21), 1.4, "oblique"),
    "vastus lateralis": (((146, 46, -4), (130, 150, 2), 8, 28), 1.8, "steep"),
    "vastus intermedius": (((122, 52, 20), (112, 150, 24), 13, 23), 1.0, "steep"),
    "pectineus": (((27, 24, 42), (92, 66, 14), 13, 14), 1.5, "oblique"),
    "adductor longus": (((15, 40, 42), (76, 150, 26), 10, 24), 1.6, "oblique"),
    "gracilis": (((14, 48, 24), (40, 160, 4), 4, 9), 2.0, "steep"),
    "iliopsoas": (((82, -16, 40), (92, 56, 12), 19, 12), 1.5, "steep"),
    "rectus femoris": (((108, -34, 40), (112, 150, 48), 10, 22), 1.4, "steep"),
    "tensor fasciae latae": (((136, -82, 42), (150, 66, 22), 12, 7), 1.8, "steep"),
    "sartorius": (((126, -92, 52), (80, 120, 62), 9, 11), 1.0, "steep"),
}

# name: start and end (u, y, z), radius at each.
PELVIS = {
    "acetabular roof": ((82, -30, 2), (84, -22, -10), 19, 21),
    "quadrilateral plate": ((63, -22, 4), (62, 22, -14), 11, 10),
    "superior pubic ramus": ((66, 0, 20), (14, 20, 44), 13, 9),
    "pubic body": ((11, 20, 42), (12, 36, 38), 9, 8),
    "inferior pubic ramus": ((13, 37, 38), (50, 68, -20), 7, 8),
    "ischium": ((68, 12, -26), (58, 66, -40), 17, 17),
    "posterior ilium": ((62, -110, -58), (60, -62, -52), 13, 13),
}
FEMUR = {
    "neck": ((92, 3, 0), (118, 24, -8), 16.5, 17),
    "greater trochanter": ((130, 8, -16), (128, 36, -10), 11, 17),
    "shaft": ((119, 36, -8), (108, 150, -2), 17, 14),
}
SACRUM = {
    "body": ((0, -120, -58), (0, -62, -76), 46, 30),
    "coccyx": ((0, -62, -78), (0, -12, -74), 18, 7),
}
VESSELS = {
    "external iliac artery": ((46, -120, -6), (64, -18, 42), 4.5, 4.0),
    "external iliac vein": ((40, -112, -16), (54, -16, 38), 5.5, 5.0),
    "femoral artery": ((64, -18, 42), (80, 120, 44), 3.8, 3.2),
    "femoral vein": ((54, -16, 38), (70, 120, 38), 4.0, 3.5),
    "internal iliac artery": ((42, -90, -40), (54, 0, -22), 3.0, 2.2),
    "inferior gluteal vessels": ((52, -30, -48), (80, 50, -58), 3.0, 2.2),
}
FEMORAL_HEAD = (89.0, 0.0, 0.0)
HEAD_RADIUS = 24.5
WING = ((78.0, -25.0, 0.0), (128.0, -90.0, 45.0), (48.0, -75.0, -60.0))  # acetabulum, ASIS, sacroiliac joint

Triple = tuple[float, float, float]
Rod = tuple[Triple, Triple, float, float]


class _Field:
    """A smooth random function of (x, y, z): a sum of plane waves with mean 0 and standard deviation about 1.

    wavelengths: mm, shortest and longest. along: a direction in which it hardly varies, which makes fibres.
    """

    WAVES = 32
    ALONG = 0.12  # what is left of a wave vector's part along the fibres

    def __init__(self, rng: np.random.Generator, wavelengths: tuple[float, float], along: Triple | None = None):
        direction = rng.normal(size=(self.WAVES, 3))
        if along is not None:
            axis = np.array(along) / np.linalg.norm(along)
            direction -= (1 - self.ALONG) * np.outer(direction @ axis, axis)
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        wavelength = np.exp(rng.uniform(*np.log(wavelengths), size=(self.WAVES, 1)))
        self.vectors = (2 * np.pi / wavelength * direction).astype(np.float32)
        self.phases = rng.uniform(0, 2 * np.pi, self.WAVES).astype(np.float32)

    def __call__(self, x: np.ndarray, y: np.ndarray, z: float) -> np.ndarray:
        """x [W], y [H], z in mm -> [W, H]; cos(a + b) expanded makes the sum over waves a matrix product."""
        a = np.outer(x, self.vectors[:, 0]) + np.float32(z) * self.vectors[:, 2] + self.phases
        b = np.outer(y, self.vectors[:, 1])
        scale = np.float32(math.sqrt(2 / self.WAVES))
        return scale * (np.cos(a) @ np.cos(b).T - np.sin(a) @ np.sin(b).T)


class _Anatomy:
    """What varies from case to case, drawn from (seed, case) alone. Lengths in mm, angles in radians."""

    def __init__(self, seed: int, case: int):
        rng = np.random.default_rng([seed, case])
        self.scale = rng.uniform(0.93, 1.04)
        self.fat = rng.uniform(8, 27)  # under the skin, at the side
        self.roll, self.yaw, self.pitch = (rng.uniform(-1, 1, 3) * [0.04, 0.07, 0.07]).tolist()
        self.shift = (rng.uniform(-1, 1, 3) * [6, 8, 5]).tolist()
        self.bladder = np.array([34, 21, 28]) * rng.uniform(0.8, 1.35) * rng.uniform(0.92, 1.08, 3)
        self.prostate = np.array([24, 20, 19]) * rng.uniform(0.85, 1.3)
        self.transition = rng.uniform(0.7, 0.9)  # the central gland's share of the prostate's width
        self.rectum = rng.uniform(9, 16)
        self.rectum_content = rng.choice(["gas", "stool"])
        self.plumpness = rng.uniform(-1.5, 2.5, len(MUSCLES)).astype(np.float32)
        self.contrast = {name: rng.uniform(0.88, 1.12) for name in TISSUE} | {"urine": rng.uniform(0.92, 1)}
        self.bowel = [_bowel_loop(rng) for _ in range(14)]
        self.bias = (rng.uniform(-1, 1, 3) * [0.10, 0.08, 0.06]).tolist()
        self.bends = [(_Field(rng, (90, 200)), _Field(rng, (22, 50))) for _ in range(3)]  # one pair an axis
        self.fibres = {
            "steep": _Field(rng, (7, 22), along=(0.2, 1.0, 0.1)),
            "oblique": _Field(rng, (7, 22), along=(0.75, 0.9, -0.2)),
        }
        self.patches = _Field(rng, (14, 60))
        self.grain = _Field(rng, (5, 14))


def _bowel_loop(rng: np.random.Generator) -> tuple[Rod, str]:
    """A loop of bowel above the bladder, and its content."""
    start = rng.uniform([-46, -112, -34], [46, -54, 50])
    end = start + rng.normal(0, [14, 7, 16])
    content = rng.choice(["gas", "stool", "bowel fluid"], p=[0.25, 0.45, 0.3])
    return (tuple(start), tuple(end), *rng.uniform(6, 14, 2)), str(content)


_anatomy = functools.lru_cache(maxsize=4)(_Anatomy)


def _forms(p: np.ndarray, weights: np.ndarray, constants: np.ndarray) -> np.ndarray:
    """Quadratic forms of (x, y, z, x^2, y^2, z^2): p [6, W, H], weights [n, 6], constants [n] -> [n, W, H].

    One matrix product for a whole shape is several times faster than its arithmetic coordinate by coordinate.
    """
    values = (weights @ p.reshape(6, -1)).reshape(-1, *p.shape[1:])
    values += constants[:, None, None]
    return values


def _ellipsoid(p: np.ndarray, centre: Triple, radii: Triple) -> np.ndarray:
    """Signed distance to first order, k0 (k0 - 1) / k1: exact on the surface, which is where it is used."""
    c, squares = np.asarray(centre), np.asarray(radii) ** np.array([[-2.0], [-4.0]])
    weights = np.hstack([-2 * squares * c, squares]).astype(np.float32)
    forms = _forms(p, weights, (squares @ c**2).astype(np.float32))
    k0, k1 = np.sqrt(np.maximum(forms, np.float32(1e-6)))
    return k0 * (k0 - 1) / k1


@functools.lru_cache(maxsize=512)
def _rod_forms(start: Triple, end: Triple, stretch: float) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """A rod's forms (squared distance to its start, share of its length) and its squared length."""
    metric = np.array([1, 1, stretch**-2])
    axis = np.subtract(end, start)
    length2 = (metric * axis) @ axis
    slopes = metric * [np.multiply(-2, start), axis / length2]
    weights = np.hstack([slopes, [metric, np.zeros(3)]])
    constants = np.array([(metric * start) @ start, -(metric * axis) @ start / length2])
    return weights.astype(np.float32), constants.astype(np.float32), np.float32(length2)


def _capsule(p: np.ndarray, rod: Rod, stretch: float = 1.0) -> np.ndarray:
    """Signed distance to a tapered rod; `stretch` widens it from back to front."""
    start, end, r0, r1 = rod
    weights, constants, length2 = _rod_forms(start, end, stretch)
    off2, along = _forms(p, weights, constants)
    t = np.minimum(np.maximum(along, 0), 1)
    off2 -= length2 * t * (2 * along - t)
    return np.sqrt(np.maximum(off2, 0)) - (np.float32(r0) + t * np.float32(r1 - r0))


def _join(distances: list[np.ndarray], blend: float = 7.0) -> np.ndarray:
    """Union with rounded seams; `blend` is their width in mm."""
    joined = distances[0]
    for d in distances[1:]:
        h = np.clip(0.5 + (d - joined) / np.float32(2 * blend), 0, 1)
        joined = d + (joined - d) * h - np.float32(blend) * h * (1 - h)
    return joined


def _meet(distances: list[np.ndarray], rounding: float = 5.0) -> np.ndarray:
    """Intersection with its corners rounded off by `rounding` mm."""
    outside = [np.maximum(d + np.float32(rounding), 0) for d in distances]
    return np.sqrt(sum(d * d for d in outside)) - np.float32(rounding)


class _Slice:
    """One slice being painted: warped coordinates, textures and the image, all [W, H]."""

    def __init__(self, anatomy: _Anatomy, position: float, size: tuple[int, int]):
        z = CENTRE_Z + HALF_DEPTH * float(position)
        pixel = np.divide(FIELD_OF_VIEW, size)
        x, y = ((np.arange(n, dtype=np.float32) - (n - 1) / 2) * float(mm) for n, mm in zip(size, pixel, strict=True))
        self.anatomy = anatomy
        self.softness = np.float32(max(POINT_SPREAD, 1.3 * pixel.max()))
        self.x, self.y, self.z = pose = self._pose(x, y, z)
        self.u = np.abs(self.x)
        squares = [c * c for c in pose]
        self.whole = np.stack([*pose, *squares])
        self.sides = np.stack([self.u, *pose[1:], *squares])
        self.depth = self.z.min(), self.z.max()
        self.patches, self.grain = anatomy.patches(x, y, z), anatomy.grain(x, y, z)
        # Far apart in the field, the two sides share the fibres' slant and not their pattern.
        folded = np.abs(x) + np.where(x < 0, np.float32(500), np.float32(0))
        self.fibres = {name: field(folded, y, z) for name, field in anatomy.fibres.items()}
        self.image = np.zeros(size, np.float32)

    def _pose(self, x: np.ndarray, y: np.ndarray, z: float) -> list[np.ndarray]:
        """The subject's own coordinates: turned, moved and scaled, then bent by smooth displacements."""
        a = self.anatomy
        bend = [WARP * warp(x, y, z) + WOBBLE * fine(x, y, z) for warp, fine in a.bends]
        gx, gy = x[:, None], y[None, :]
        turned = (gx - a.roll * gy, gy + a.roll * gx, z + a.yaw * gx + a.pitch * gy)
        return [(t - s) / np.float32(a.scale) + b for t, s, b in zip(turned, a.shift, bend, strict=True)]

    def tissue(self, name: str) -> np.float32:
        return np.float32(TISSUE[name] * self.anatomy.contrast[name])

    def paint(self, distance: np.ndarray, value: np.ndarray, opacity: np.ndarray | float = 1.0) -> None:
        """Lay `value` over the image where `distance` is negative, its edge as soft as a pixel is wide."""
        cover = np.minimum(np.maximum(0.5 - distance / self.softness, 0), opacity)
        self.image += cover * (value - self.image)

    def meets(self, rod: Rod, stretch: float = 1.0) -> bool:
        """Whether a rod comes near enough to the slice to be worth painting."""
        start, end, *radii = rod
        reach = stretch * max(radii) + MARGIN
        low, high = sorted((start[2], end[2]))
        return bool(low - reach < self.depth[1] and high + reach > self.depth[0])

    def rods(self, table: dict[str, Rod]) -> list[np.ndarray]:
        return [_capsule(self.sides, rod) for rod in table.values() if self.meets(rod)]


def _ramp(values: np.ndarray, low: float, high: float) -> np.ndarray:
    t = np.clip((values - np.float32(low)) / np.float32(high - low), 0, 1)
    return t * t * (3 - 2 * t)


def _outline(s: _Slice) -> tuple[np.ndarray, np.ndarray]:
    """Signed distances to the skin and to the fascia under the subcutaneous fat."""
    narrowing = (1 - np.abs((s.z - 5) / 125) ** 2.5) ** 0.4
    fascia = s.u - (143 + 14 * _ramp(s.y, -110, 20)) * narrowing
    return fascia - np.float32(s.anatomy.fat) * (0.75 + 0.35 * _ramp(s.y, -100, 40)), fascia


def _paint_fat(s: _Slice, skin: np.ndarray) -> None:
    strands = np.maximum(s.fibres["oblique"] - 0.7, 0)
    s.paint(skin, s.tissue("skin"))
    s.paint(skin + 2.2, s.tissue("fat") * (1 + 0.03 * s.patches + 0.015 * s.grain - 0.10 * strands))


def _wing(s: _Slice) -> tuple[np.ndarray, np.ndarray]:
    """Height over the iliac wing's plane (positive outside the pelvis), and the wing's signed distance."""
    base, front, back = (np.array(corner) for corner in WING)
    normal = np.cross(front - base, back - base)
    normal = (normal * np.sign(normal[0]) / np.linalg.norm(normal)).astype(np.float32)
    height = sum(n * (c - np.float32(b)) for n, c, b in zip(normal, (s.u, s.y, s.z), base, strict=True))
    front_edge = s.z - (30 - 0.3 * (s.y + 30))
    back_edge = (-15 + 0.9 * (s.y + 20)) - s.z
    plate = np.abs(height) - (5 + 0.06 * np.clip(s.y + 90, 0, 60))
    return height, _meet([plate, s.y + 20, front_edge, back_edge])


def _paint_muscles(s: _Slice, fascia: np.ndarray, height: np.ndarray) -> None:
    flesh = {
        name: s.tissue("muscle") * (1 + 0.14 * fibre + 0.06 * s.patches) + 60 * np.clip(fibre - 1.2, 0, 1)
        for name, fibre in s.fibres.items()
    }
    septum, gap = s.tissue("septum"), np.float32(1.6)
    fade = np.clip(0.6 + 0.4 * s.patches, 0.1, 1)  # partial volume hides parts of a septum
    gluteal = np.maximum.reduce([-height, fascia + 1, 0.7 * (s.y + 8 - 0.8 * (s.u - 100)), 84 - s.u])
    s.paint(gluteal, flesh["steep"])
    s.paint(np.abs(height - 22 - 0.1 * s.y) - 0.4 + np.maximum(gluteal, 0), septum, opacity=0.6)
    for (rod, stretch, fibre), plump in zip(MUSCLES.values(), s.anatomy.plumpness, strict=True):
        if s.meets(rod, stretch):
            d = np.maximum(_capsule(s.sides, rod, stretch) - plump, fascia + 1)
            s.paint(d, septum, opacity=fade)
            s.paint(d + gap, flesh[fibre])
    levator = _capsule(s.sides, ((52, 2, -14), (13, 48, -14), 2.0, 2.6), stretch=20)
    s.paint(levator, flesh["oblique"])


def _paint_bone(s: _Slice, distance: np.ndarray, cortex: float, marrow: np.ndarray) -> None:
    s.paint(distance, s.tissue("cortex"))
    s.paint(distance + np.float32(cortex), marrow)


def _paint_skeleton(s: _Slice, wing: np.ndarray) -> None:
    p = s.sides
    marrow = s.tissue("marrow") * (1 + 0.10 * s.patches + 0.06 * s.grain)
    if sacrum := s.rods(SACRUM):
        _paint_bone(s, _join(sacrum), 2.0, 0.85 * marrow)
        for level in (-96, -72, -50):
            s.paint(_ellipsoid(p, (19, level, -64), (5, 4, 14)), s.tissue("muscle"))
    _paint_bone(s, _join([wing, *s.rods(PELVIS)]), 1.8, 0.9 * marrow)
    s.paint(_ellipsoid(p, (0, 28, 40), (2.6, 18, 14)), s.tissue("cortex"))

    head = _ellipsoid(p, FEMORAL_HEAD, (HEAD_RADIUS,) * 3)
    s.paint(head - 4.5, s.tissue("cartilage"))
    s.paint(np.abs(head) - 1.2, s.tissue("cortex"))
    s.paint(_ellipsoid(p, (64, 8, -2), (3.5, 9, 8)), s.tissue("fat"))
    femur = _join([head, *s.rods(FEMUR)])
    in_shaft = _ramp(s.y, 15, 70)
    _paint_bone(s, femur, 2.6, marrow + (s.tissue("shaft marrow") - marrow) * in_shaft)


def _paint_organs(s: _Slice) -> None:
    a, p = s.anatomy, s.whole
    for rod, content in a.bowel:
        if s.meets(rod):
            loop = _capsule(p, rod)
            s.paint(loop - 1, s.tissue("bowel wall"))
            s.paint(loop + 2, s.tissue(content) * (1 + 0.12 * s.grain))
    canal = _capsule(p, ((0, 44, -36), (0, 88, -48), 10, 11))
    s.paint(canal, s.tissue("muscle"))
    s.paint(canal + 5, s.tissue("bowel wall") * (1.3 + 0.2 * s.grain))
    rectum = _capsule(p, ((6, -60, -48), (0, 62, -34), a.rectum, 0.6 * a.rectum))
    s.paint(rectum - 4, s.tissue("bowel wall"))
    s.paint(rectum, s.tissue(str(a.rectum_content)) * (1 + 0.2 * s.patches))
    vesicles = _ellipsoid(s.sides, (17, 4, -20), (17, 7, 8))
    s.paint(vesicles, s.tissue("peripheral zone") * (0.8 + 0.12 * s.grain))
    bladder = _ellipsoid(p, (0, 9 - a.bladder[1], 16), a.bladder)
    s.paint(bladder - 4.5, s.tissue("bladder wall"))
    s.paint(bladder, s.tissue("urine") * (1 - 0.05 * np.abs(s.patches)))
    _paint_prostate(s)
    bulb = _ellipsoid(s.sides, (6.5, 64, 36), (6.5, 13, 22))
    s.paint(_ellipsoid(p, (0, 62, 38), (15, 18, 24)), s.tissue("capsule"))
    s.paint(bulb, s.tissue("erectile") * (1 + 0.15 * s.grain))
    for vessel in s.rods(VESSELS):
        s.paint(vessel, s.tissue("vessel"))


def _paint_prostate(s: _Slice) -> None:
    a, p = s.anatomy, s.whole
    centre = np.array([0, 8 + 0.8 * a.prostate[1], 4])
    gland = _ellipsoid(p, centre, a.prostate)
    s.paint(gland - 1.5, s.tissue("capsule"))
    s.paint(gland, s.tissue("peripheral zone") * (1 + 0.08 * s.grain))
    # The central gland sits up and forward, which leaves the peripheral zone below, behind and at the sides.
    forward = a.prostate * np.array([0, -0.34, 0.24])
    central = _ellipsoid(p, centre + forward, a.prostate * np.array([a.transition, 0.78, 0.8]))
    s.paint(central, s.tissue("capsule"))
    s.paint(central + 1.5, s.tissue("central gland") * (1 + 0.18 * s.grain + 0.12 * s.patches))


def _coil(s: _Slice, skin: np.ndarray) -> np.ndarray:
    """Receive sensitivity: high near the array on the skin, falling with depth, and a little lopsided."""
    x, y = s.x / 200, s.y / 100
    tilt = s.anatomy.bias
    return 0.94 + 0.55 * np.exp(np.minimum(skin, 0) / 20) + tilt[0] * x + tilt[1] * y + tilt[2] * x * y


def render_slice(
    case: int, position: float, *, size: tuple[int, int] = (256, 128), noise: float = 0.008, seed: int = 0
) -> np.ndarray:
    """One coronal slice: float32 [size], first axis left to right, second head to foot, from 0 to about 600.

    The anatomy depends on (seed, case), the noise on (seed, case, position).

    Args:
      case: which subject.
      position: from -1 (the back of the pelvis) to 1 (the front).
      size: pixels; the field of view is 400 mm x 200 mm whatever their number.
      noise: Rician sigma as a share of the brightest tissue.
      seed: which population of subjects.

    Raises:
      ConfigError: `position` is outside [-1, 1].
    """
    if not -1 <= position <= 1:
        raise ConfigError(f"position is {position!r}, but must be between -1 and 1")
    s = _Slice(_anatomy(seed, case), position, size)
    skin, fascia = _outline(s)
    height, wing = _wing(s)
    _paint_fat(s, skin)
    _paint_muscles(s, fascia, height)
    _paint_skeleton(s, wing)
    _paint_organs(s)
    # Never 0 in third place: a seed sequence ignores trailing zeros, and the noise would repeat the anatomy.
    rng = np.random.default_rng([seed, case, 1 + round((position + 1) * 1e6)])
    real, imaginary = rng.standard_normal((2, *size), np.float32) * np.float32(noise * BRIGHTEST)
    return np.hypot(s.image * _coil(s, skin) + real, imaginary)

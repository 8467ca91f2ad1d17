"""A photo of a face, split into layers and turned into a 3D puppet with known geometry.

The photo is the astronaut image of scikit-image (NASA, public domain). MediaPipe's face mesh gives
it depth; a few smooth deformations of the mesh shut and open the jaw, shape the lips and close the
eyelids.

Shape legend: V vertices of the head, F triangles. "Photo pixels" are those of the 512 px photo,
centres at +0.5; depth is in the same unit, away from the camera.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from scipy.sparse import coo_matrix, diags
from scipy.sparse.linalg import splu
from scipy.spatial import Delaunay

from talkhead_cli.contracts import LABELS

CROP = (52.0, -25.0, 340.0)  # left, top and side of the picture in photo pixels
MARGIN = 24.0  # photo pixels kept beyond the crop, for what moves into view
TEXELS = 3  # texture pixels per photo pixel
FOCAL = 2.0  # focal length in picture sides
FACE, MOUTH, HAIR, NECK, TORSO, BACKGROUND = range(len(LABELS))

# inner lips from the corner on the picture's left to the other, then three rings outwards
UPPER_LIP = (
    (78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308),
    (62, 183, 42, 41, 38, 12, 268, 271, 272, 407, 292),
    (76, 184, 74, 73, 72, 11, 302, 303, 304, 408, 306),
    (61, 185, 40, 39, 37, 0, 267, 269, 270, 409, 291),
)
LOWER_LIP = (
    (78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308),
    (62, 96, 89, 179, 86, 15, 316, 403, 319, 325, 292),
    (76, 77, 90, 180, 85, 16, 315, 404, 320, 307, 306),
    (61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291),
)
EYES = (  # upper lid, lower lid; the picture's left eye first
    ((33, 246, 161, 160, 159, 158, 157, 173, 133), (33, 7, 163, 144, 145, 153, 154, 155, 133)),
    ((362, 398, 384, 385, 386, 387, 388, 466, 263), (362, 382, 381, 380, 374, 373, 390, 249, 263)),
)
IRIS = (range(468, 473), range(473, 478))
OVAL = (
    *(10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377),
    *(152, 148, 176, 149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109),
)
CHIN = (152, 148, 377, 176, 400, 175, 199, 171, 396, 208, 428)


@dataclass(frozen=True)
class Sitter:
    """The photo split into layers. Textures are float32 RGBA in [0, 1], premultiplied by alpha.

    points (478, 3) photo pixels · mesh (V, 3) photo pixels, the first 468 are the face ·
    triangles (F, 3) · eyes, mouth (h, w, 3): textures behind the lids and behind the lips ·
    kind (h, w) label of each texel of the head · neck_box left, top, right, bottom
    """

    points: np.ndarray
    mesh: np.ndarray
    triangles: np.ndarray
    head: np.ndarray
    neck: np.ndarray
    torso: np.ndarray
    eyes: np.ndarray
    mouth: np.ndarray
    kind: np.ndarray
    neck_box: tuple[float, float, float, float]


# ---------------------------------------------------------------- the photo, taken apart


def _face_triangles() -> np.ndarray:
    """Return triangles (F, 3) of the 468-point mesh, with eyes and mouth filled."""
    from mediapipe.python.solutions.face_mesh_connections import FACEMESH_TESSELATION

    near: dict[int, set[int]] = {}
    for a, b in FACEMESH_TESSELATION:
        near.setdefault(a, set()).add(b)
        near.setdefault(b, set()).add(a)
    found = {tuple(sorted((a, b, c))) for a in near for b in near[a] for c in near[a] & near[b]}
    found -= {(49, 64, 129), (279, 294, 358)}  # loops of edges that are not faces of the mesh
    for upper, lower in (*EYES, (UPPER_LIP[0], LOWER_LIP[0])):
        for i in range(len(upper) - 1):
            found |= {(upper[i], upper[i + 1], lower[i]), (upper[i + 1], lower[i + 1], lower[i])}
    return np.array(sorted(t for t in found if len(set(t)) == 3))


def _laplacian(edges: np.ndarray, n: int) -> coo_matrix:
    """Return the graph Laplacian of `edges` (E, 2) over n vertices."""
    i, j = np.unique(np.sort(edges, 1), axis=0).T
    w = coo_matrix((np.ones(len(i)), (i, j)), shape=(n, n)).tocsr()
    w = w + w.T
    return diags(np.asarray(w.sum(1)).ravel()) - w


def _spread(triangles: np.ndarray, n: int, at: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the smoothest (biharmonic) field (n, k) on the mesh with `values` (c, k) at `at`."""
    edges = triangles[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2)
    matrix = _laplacian(edges, n)
    matrix = (matrix.T @ matrix + 1e-9 * diags(np.ones(n))).tocsc()
    free = np.setdiff1d(np.arange(n), at)
    out = np.zeros((n, values.shape[1]))
    out[at] = values
    out[free] = splu(matrix[free][:, free].tocsc()).solve(-(matrix[free][:, at] @ values))
    return out


def _texel(xy: np.ndarray) -> np.ndarray:
    """Convert photo pixels (..., 2) to texture coordinates, pixel centres at whole numbers."""
    return (xy - (np.array(CROP[:2]) - MARGIN)) * TEXELS - 0.5


def _drawn(polygon: np.ndarray, side: int, grow_px: float = 0.0) -> np.ndarray:
    """Return the float32 mask (side, side) of a polygon (k, 2) in texels."""
    mask = np.zeros((side, side), np.uint8)
    cv2.fillPoly(mask, [np.round(polygon * 16).astype(np.int32)], 255, cv2.LINE_AA, 4)
    if grow_px:
        k = 2 * round(abs(grow_px)) + 1
        disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (k, k))
        mask = cv2.dilate(mask, disc) if grow_px > 0 else cv2.erode(mask, disc)
    return mask.astype(np.float32) / 255


def _soft(mask: np.ndarray, sigma: float) -> np.ndarray:
    return cv2.GaussianBlur(mask.astype(np.float32), (0, 0), sigma)


def _filled(rgb: np.ndarray, hole: np.ndarray, radius: float = 4.0) -> np.ndarray:
    """Inpaint `hole` (bool) of uint8 `rgb` from its rim, at photo resolution for speed."""
    small = cv2.resize(rgb, None, fx=1 / TEXELS, fy=1 / TEXELS, interpolation=cv2.INTER_AREA)
    gap = cv2.resize(hole.astype(np.uint8), small.shape[1::-1], interpolation=cv2.INTER_AREA)
    gap = cv2.dilate(gap, np.ones((3, 3), np.uint8))
    painted = cv2.inpaint(small, gap, radius, cv2.INPAINT_TELEA)
    painted = cv2.resize(painted, rgb.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    share = _soft(hole, 1.0)[..., None]
    return (rgb * (1 - share) + painted * share).astype(np.uint8)


def _lined(
    rgb: np.ndarray, line: np.ndarray, colour: tuple[int, int, int], strength: float
) -> np.ndarray:
    """Draw a soft line (k, 2), one photo pixel wide, on uint8 `rgb`."""
    ink = np.zeros(rgb.shape[:2], np.uint8)
    path = np.round(line * 16).astype(np.int32)
    cv2.polylines(ink, [path], False, 255, TEXELS, cv2.LINE_AA, 4)
    share = strength * _soft(ink, 0.8)[..., None] / 255
    return (rgb * (1 - share) + np.array(colour) * share).astype(np.uint8)


def _layer(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Return a float32 texture (h, w, 4), premultiplied by alpha."""
    alpha = np.clip(alpha, 0, 1).astype(np.float32)[..., None]
    return np.concatenate([rgb.astype(np.float32) / 255 * alpha, alpha], 2)


def _canvas(picture: np.ndarray, interpolation: int = cv2.INTER_CUBIC) -> np.ndarray:
    """Return the part of the photo that the textures cover, enlarged to texels."""
    left, top = (round(c - MARGIN) for c in CROP[:2])
    side = round(CROP[2] + 2 * MARGIN)
    part = cv2.copyMakeBorder(picture, -top, 0, 0, 0, cv2.BORDER_REPLICATE)
    part = np.ascontiguousarray(part[:side, left : left + side])
    return cv2.resize(part, None, fx=TEXELS, fy=TEXELS, interpolation=interpolation)


def _person(photo: np.ndarray) -> np.ndarray:
    """Return the binary mask of the person in the photo (512, 512), float32."""
    from mediapipe.python.solutions.selfie_segmentation import SelfieSegmentation

    with SelfieSegmentation(model_selection=0) as segment:
        likely = segment.process(photo).segmentation_mask
    guess = np.where(likely > 0.5, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (15, 15))
    guess[cv2.erode((likely > 0.9).astype(np.uint8), disc) > 0] = cv2.GC_FGD
    guess[cv2.dilate((likely > 0.1).astype(np.uint8), disc) == 0] = cv2.GC_BGD
    cv2.setRNGSeed(0)
    models = np.zeros((2, 1, 65))
    cv2.grabCut(photo, guess, None, models[0], models[1], 3, cv2.GC_INIT_WITH_MASK)
    mask = np.isin(guess, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(np.uint8)
    mask = cv2.morphologyEx(mask, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    return mask.astype(np.float32)


@lru_cache(maxsize=1)
def photo_parts() -> Sitter:
    """Split the photo: depth, layers, and what is hidden behind lips and lids."""
    from mediapipe.python.solutions.face_mesh import FaceMesh
    from skimage.data import astronaut

    photo = astronaut()
    with FaceMesh(static_image_mode=True, refine_landmarks=True) as find:
        seen = find.process(cv2.resize(photo, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC))
    points = np.array([(p.x, p.y, p.z) for p in seen.multi_face_landmarks[0].landmark]) * 512
    rgb = _canvas(photo)
    side = rgb.shape[0]
    person = np.clip(_soft(_canvas(_person(photo), cv2.INTER_LINEAR), 3.0) * 2.4 - 0.9, 0, 1)
    x, y = (np.stack(np.meshgrid(*[np.arange(side) + 0.5] * 2)) / TEXELS) + (
        np.array(CROP[:2]) - MARGIN
    )[:, None, None]
    oval = _texel(points[list(OVAL), :2])
    face = _drawn(oval, side)

    # skin against hair, by colour; ears are skin outside the oval
    lab = cv2.cvtColor(_soft(rgb, 2.0).astype(np.uint8), cv2.COLOR_RGB2LAB).astype(np.float32)
    skin_at = _drawn(_texel(points[[117, 101, 50, 205, 187, 123], :2]), side) > 0.5
    skin_at |= _drawn(_texel(points[[346, 330, 280, 425, 411, 352], :2]), side) > 0.5
    hair_at = (y > 25) & (y < 60) & (abs(x - 225) < 40)
    off_skin = ((lab - lab[skin_at].mean(0)) / (lab[skin_at].std(0) + 12)) ** 2
    off_hair = ((lab - lab[hair_at].mean(0)) / (lab[hair_at].std(0) + 12)) ** 2
    is_skin = _soft(off_skin.sum(2) < off_hair.sum(2), 3.0) > 0.5
    brow_y = points[[105, 334], 1].min()
    kind = np.where(is_skin | ((face > 0.5) & (y > brow_y)), FACE, HAIR).astype(np.uint8)
    jaw_y = points[[132, 361], 1].max() + 6
    kind[y > points[[132, 361], 1].mean()] = FACE
    kind[cv2.dilate(face, np.ones((2 * 12 * TEXELS + 1,) * 2, np.uint8)) < 0.5] = HAIR
    kind[(y < points[10, 1] - 4) | ((face < 0.5) & (y < points[127, 1]))] = HAIR

    # head: hair, ears and face; mouth and eyes are inpainted, as they have layers of their own
    upper_head = person * np.clip((jaw_y - y) * 1.5 + 0.5, 0, 1)
    head_alpha = np.maximum(upper_head, _soft(_drawn(oval, side, 2), 1.5) * person)
    lips = _texel(points[[*UPPER_LIP[0], *LOWER_LIP[0][-2:0:-1]], :2])
    lids = [_texel(points[[*up, *down[-2:0:-1]], :2]) for up, down in EYES]
    head_rgb = _filled(rgb, _drawn(lips, side, 3) > 0.3)
    red = _texel(points[[*UPPER_LIP[3], *LOWER_LIP[3][-2:0:-1]], :2])
    share = _soft(_drawn(red, side), 2.5)[..., None]
    head_rgb = (head_rgb * (1 - share * [0.10, 0.27, 0.22])).astype(np.uint8)
    head_rgb = _lined(head_rgb, lips[:11], (104, 52, 50), 0.5)
    head_rgb = _lined(head_rgb, np.concatenate([lips[10:], lips[:1]]), (104, 52, 50), 0.5)
    eyes_rgb = rgb.copy()
    for lid in lids:
        head_rgb = _filled(head_rgb, _drawn(lid, side, 1) > 0.3)
        head_rgb = _lined(head_rgb, lid[:9], (58, 38, 30), 0.75)
        around = (_drawn(lid, side, 14) > 0.5) & (_drawn(lid, side, -2) < 0.5)
        eyes_rgb = _filled(eyes_rgb, around)

    # mouth: the photo's upper teeth over a dark cavity with a tongue
    middle = _texel(points[[13, 14], :2]).mean(0) / TEXELS
    px, py = (np.arange(side)[None] / TEXELS - middle[0]), (np.arange(side)[:, None] / TEXELS)
    tongue = np.exp(-((px / 14) ** 2) - ((py - middle[1] - 15) / 6) ** 2)[..., None]
    hollow = np.array([46, 16, 17]) * (1 - tongue) + np.array([132, 62, 60]) * tongue
    teeth = _soft(_drawn(lips, side, -2), 2.0)[..., None]
    mouth_rgb = np.clip(hollow * (1 - teeth) + rgb * 0.92 * teeth, 0, 255)

    # neck: the skin below the jaw, extended upwards behind the face
    r, g, b = (c.astype(int) for c in cv2.split(rgb))
    below = (y > points[[58, 288], 1].min() - 6) & (y < 200) & (face < 0.5)
    neck = below & (abs(x - 220) < 46) & (r > 80) & (r - b > 18) & (person > 0.5)
    neck = cv2.morphologyEx(neck.astype(np.uint8), cv2.MORPH_OPEN, np.ones((9, 9), np.uint8))
    spots, marked, sizes, _ = cv2.connectedComponentsWithStats(neck)
    neck = marked == (1 + int(np.argmax(sizes[1:, cv2.CC_STAT_AREA])))
    columns = np.flatnonzero(neck.any(0))
    behind = np.zeros_like(neck)
    behind[:, columns[0] : columns[-1] + 1] = True
    bottom = side - np.argmax(neck[::-1], 0)
    bottom[~neck.any(0)] = 0
    whole = behind & (y > 128) & (np.arange(side)[:, None] < bottom[None])
    neck_rgb = rgb.copy()
    known = cv2.erode(neck.astype(np.uint8), np.ones((7, 7), np.uint8)) > 0
    neck_rgb = _filled(neck_rgb, (~known) & (_soft(whole, 6) > 0.02), 10)
    depth_of_shade = np.clip((points[152, 1] - 4 - y) / 30, 0, 1)[..., None]
    neck_rgb = (neck_rgb * (1 - 0.35 * depth_of_shade)).astype(np.uint8)
    neck_alpha = _soft(whole, 2.0)

    # torso: all of the person below, inpainted where head and neck hide it
    hidden = (_soft(np.maximum(upper_head, face), 4) > 0.05) | (_soft(neck, 3) > 0.05)
    ring_y = 149 + (x - 185) * 0.35  # the collar's far rim, where the head hides it
    torso_alpha = np.where(hidden, y > ring_y, person * np.clip((y - 144) / 2, 0, 1))
    torso_rgb = _filled(rgb, hidden & (y > 120), 6)

    mesh, triangles = _head_mesh(points, head_alpha, oval)
    return Sitter(
        points,
        mesh,
        triangles,
        _layer(head_rgb, head_alpha),
        _layer(neck_rgb, neck_alpha),
        _layer(torso_rgb, _soft(torso_alpha, 1.5)),
        eyes_rgb.astype(np.float32) / 255,
        mouth_rgb.astype(np.float32) / 255,
        kind,
        (x[0, columns[0]] - 8, 120.0, x[0, columns[-1]] + 8, float(y[bottom.max() - 1, 0]) + 8),
    )


def _head_mesh(
    points: np.ndarray, alpha: np.ndarray, oval: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return vertices (V, 3), the 468 face points and a cap of hair, and triangles (F, 3)."""
    wide = cv2.dilate(alpha, np.ones((45, 45), np.uint8)) > 0.02
    rim = oval.astype(np.float32)
    step = 8.0 * TEXELS
    rows = np.arange(0, alpha.shape[0], step)
    grid = np.array([(c + (k % 2) * step / 2, r) for k, r in enumerate(rows) for c in rows])
    kept = []
    for c, r in grid:
        inside = wide[min(int(r), len(wide) - 1), min(int(c), len(wide) - 1)]
        far = cv2.pointPolygonTest(rim, (float(c), float(r)), True) < -6.0 * TEXELS
        kept.append(inside and far)
    # a ring close to the jaw holds the soft edge of the face
    centre = oval.mean(0)
    ring = (
        centre
        + (oval - centre) * (1 + 6.5 * TEXELS / np.linalg.norm(oval - centre, axis=1))[:, None]
    )
    outer = np.concatenate([grid[np.array(kept)], ring])
    together = np.concatenate([oval, outer])
    cells = Delaunay(together).simplices
    middle = together[cells].mean(1)
    size = np.linalg.norm(together[cells] - together[np.roll(cells, 1, 1)], axis=2).max(1)
    ok = [
        cv2.pointPolygonTest(rim, (float(u), float(v)), False) < 0 and s < 2.2 * step
        for (u, v), s in zip(middle, size, strict=True)
    ]
    names = np.concatenate([np.array(OVAL), 468 + np.arange(len(outer))])
    triangles = np.concatenate([_face_triangles(), names[cells[np.array(ok)]]])

    photo_xy = (outer + 0.5) / TEXELS + (np.array(CROP[:2]) - MARGIN)
    mesh = np.concatenate([points[:468], np.column_stack([photo_xy, np.zeros(len(outer))])])
    rows_, columns_ = np.nonzero(alpha > 0.5)
    left, right, top = columns_.min(), columns_.max(), rows_.min()
    hair = (np.array([left, right, top]) + 0.5) / TEXELS
    middle_x = (hair[0] + hair[1]) / 2 + CROP[0] - MARGIN
    top_y, low_y = hair[2] + CROP[1] - MARGIN, points[152, 1]
    x = (mesh[:, 0] - middle_x) / ((hair[1] - hair[0]) / 2)
    y = (mesh[:, 1] - (top_y + low_y) / 2) / ((low_y - top_y) / 2)
    cap = 62 - 80 * np.sqrt(1 - np.clip(x**2 + y**2, 0, 0.96))
    edge = np.flatnonzero((x**2 + y**2 > 0.85) & (np.arange(len(mesh)) >= 468))
    at = np.concatenate([np.array(OVAL), edge])
    bend = np.concatenate([points[list(OVAL), 2] - cap[list(OVAL)], np.zeros(len(edge))])
    # towards the jaw the cap must not recede: the soft edge stays at the face's depth
    low = mesh[edge, 1] > points[[132, 361], 1].mean()
    near = np.argmin(((mesh[edge, None, :2] - points[None, list(OVAL), :2]) ** 2).sum(2), 1)
    own = points[np.array(OVAL)[near], 2] + 3 - cap[edge]
    bend[len(OVAL) :][low] = own[low]
    outside = triangles[(triangles >= 468).any(1) | np.isin(triangles, OVAL).all(1)]
    used, packed = np.unique(outside, return_inverse=True)
    where = np.searchsorted(used, at)
    held = np.isin(at, used)
    filled = _spread(packed.reshape(-1, 3), len(used), where[held], bend[held, None])[:, 0]
    mesh[used[used >= 468], 2] = (cap[used] + filled)[used >= 468]
    return mesh, triangles


# ---------------------------------------------------------------- the head that moves


@dataclass(frozen=True)
class Puppet:
    """The head in head space and its deformations, all in face heights.

    rest (V+10, 3), mouth shut, eyes open; the last ten are the irises · jaw, spread, rounded,
    blink, sway (V+10, 3) displacements for a control of 1 · rotation (3, 3) and translation
    (3,) place it as in the photo · depth of the photo plane from the camera, face heights ·
    unit_px photo pixels in a face height
    """

    rest: np.ndarray
    jaw: np.ndarray
    spread: np.ndarray
    rounded: np.ndarray
    blink: np.ndarray
    sway: np.ndarray
    rotation: np.ndarray
    translation: np.ndarray
    depth: float
    unit_px: float

    def lifted(self, photo: np.ndarray) -> np.ndarray:
        """Map photo pixels with depth (..., 3) to head space."""
        z = self.depth + photo[..., 2:] / self.unit_px
        middle = np.array(CROP[:2]) + CROP[2] / 2
        xy = (photo[..., :2] - middle) / (FOCAL * CROP[2]) * z
        return (np.concatenate([xy, z], -1) - self.translation) @ self.rotation


@lru_cache(maxsize=1)
def photo_puppet() -> Puppet:
    """Place the photo's mesh in head space and solve for its deformations."""
    sitter = photo_parts()
    n = len(sitter.mesh)
    points = np.concatenate([sitter.mesh, sitter.points[468:]])
    across = sum(points[b] - points[a] for a, b in ((33, 263), (234, 454), (61, 291), (127, 356)))
    x = across / np.linalg.norm(across)
    down = points[152] - points[10]
    y = down - x * (down @ x)
    y /= np.linalg.norm(y)
    rotation = np.stack([x, y, np.cross(x, y)], 1)
    unit = float(np.linalg.norm(down))
    for _ in range(3):  # shutting the mouth raises the chin, which changes the unit
        depth = FOCAL * CROP[2] / unit
        ears = points[[234, 454]].mean(0) + [0, 0, 0.15 * unit]
        flat = Puppet(*[points] * 6, np.eye(3), np.zeros(3), depth, unit)
        origin = flat.lifted(ears[None])[0]
        puppet = Puppet(*[points] * 6, rotation, origin, depth, unit)
        rest = puppet.lifted(points)
        shut = _mouth_modes(rest, sitter.triangles, n)
        unit *= float(np.linalg.norm((rest + shut[0])[152] - (rest + shut[0])[10]))
    closed = rest + shut[0]
    away = np.maximum(0, np.linalg.norm(rest[:n, :2] - rest[10, :2] * [1, 0.6], axis=1) - 0.45)
    sway = np.zeros_like(rest)
    sway[468:n, 0] = np.minimum(away, 0.5)[468:]
    blink = _blink(closed, sitter.triangles, n)
    return Puppet(closed, *shut[1:], blink, sway, rotation, origin, depth, unit)


def _mouth_modes(rest: np.ndarray, triangles: np.ndarray, n: int) -> tuple[np.ndarray, ...]:
    """Return displacements (V+10, 3) that shut the photo's smile, open, spread, round the lips."""
    upper, lower = np.array(UPPER_LIP), np.array(LOWER_LIP)
    hole = set(UPPER_LIP[0]) | set(LOWER_LIP[0])
    skin = np.array([t for t in triangles if not set(t) <= hole])
    centre = rest[[78, 308]].mean(0)
    half = abs(rest[308, 0] - rest[78, 0]) / 2
    still = [v for v in range(n) if rest[v, 1] < rest[2, 1] + 0.01 or v in (234, 454, 93, 323)]
    still += [v for v in range(468, n) if rest[v, 1] < rest[61, 1]]
    still = np.setdiff1d(still, [*upper.ravel(), *lower.ravel(), *CHIN])
    share = np.array([1.0, 0.95, 0.88, 0.8])[:, None, None]  # outer rings follow a little less
    bow = np.clip(1 - ((rest[upper[0], 0] - centre[0]) / half) ** 2, 0, 1)[:, None] ** 0.8

    def solved(up: np.ndarray, down: np.ndarray, chin: np.ndarray) -> np.ndarray:
        """Extend lip displacements (4, 11, 3), twice, and the chin's (3,) to (V+10, 3)."""
        moves = {int(v): m for v, m in zip(upper.ravel(), up.reshape(-1, 3), strict=True)}
        for v, m in zip(lower.ravel(), down.reshape(-1, 3), strict=True):
            moves[int(v)] = (moves[int(v)] + m) / 2 if int(v) in moves else m
        moves |= dict.fromkeys(CHIN, chin) | dict.fromkeys(map(int, still), np.zeros(3))
        at = np.array(sorted(moves))
        field = _spread(skin, n, at, np.array([moves[v] for v in at]))
        return np.concatenate([field, np.zeros((len(rest) - n, 3))])

    gap = rest[lower[0]] - rest[upper[0]]
    x_off = (rest[upper] - centre) * [1, 0, 0], (rest[lower] - centre) * [1, 0, 0]
    level = np.array([0, 0.030, 0]) * (1 - bow)  # lowers the corners of the smile
    narrow = -0.14
    shut = solved(
        share * (0.42 * gap + level) + x_off[0] * narrow,
        share * (-0.58 * gap + level) + x_off[1] * narrow,
        np.array([0, -0.45 * np.linalg.norm(gap[5]), 0]),
    )
    fall = np.array([0, 0.135, 0.02])
    inward = -0.16
    jaw = solved(
        share * (bow * [0, -0.010, 0] + (1 - bow) * [0, 0.055, 0]) + x_off[0] * inward,
        share * (bow * fall + (1 - bow) * [0, 0.055, 0]) + x_off[1] * inward,
        0.85 * fall,
    )
    spread = solved(x_off[0] * 0.14, x_off[1] * 0.14, np.zeros(3))
    pout = np.array([0, 0, -0.035]) * (0.4 + 0.6 * bow)
    thick = np.array([0.0, 0.005, 0.010, 0.014])[:, None, None] * np.array([0, 1, 0])
    rounded = solved(
        x_off[0] * -0.17 + pout - thick * bow, x_off[1] * -0.17 + pout + thick * bow, np.zeros(3)
    )
    return shut, jaw, spread, rounded


def _blink(rest: np.ndarray, triangles: np.ndarray, n: int) -> np.ndarray:
    """Return the displacement (V+10, 3) that closes both upper lids onto the lower ones."""
    moves: dict[int, np.ndarray] = {}
    reach = np.full(n, np.inf)
    for upper, lower in EYES:
        for a, b in zip(upper[1:-1], lower[1:-1], strict=True):
            gap = rest[b] - rest[a]
            moves[a], moves[b] = 0.93 * gap - [0, 0, 0.004], -0.07 * gap
        moves[upper[0]] = moves[upper[-1]] = np.zeros(3)
        middle = rest[[*upper, *lower]].mean(0)
        reach = np.minimum(reach, np.linalg.norm((rest[:n] - middle)[:, :2] * [0.8, 1], axis=1))
    moves |= {v: np.zeros(3) for v in range(n) if reach[v] > 0.105 and v not in moves}
    at = np.array(sorted(moves))
    field = _spread(triangles, n, at, np.array([moves[v] for v in at]))
    return np.concatenate([field, np.zeros((len(rest) - n, 3))])

"""Points in the files of other programs, as text or bytes."""

import json

import numpy as np

from tests.support.made_up_results import FIXED_LUNGS, points_in

POINTS = points_in(FIXED_LUNGS.grid, 4)
RAS = POINTS * [-1, -1, 1]


def fcsv(points: np.ndarray, system: str) -> str:
    rows = "".join(f"f_{n},{x},{y},{z},0,0,0,1,1,1,0,F-{n},{n or ''},\n" for n, (x, y, z) in enumerate(points))
    return (
        f"# Markups fiducial file version = 4.11\n# CoordinateSystem = {system}\n"
        f"# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID\n{rows}"
    )


def markups(points: np.ndarray, system: str) -> str:
    control = [
        {"id": str(n), "label": f"F-{n}", "position": p, "description": ""} for n, p in enumerate(points.tolist())
    ]
    control.append({"id": "9", "position": [0, 0, 0], "positionStatus": "undefined"})
    return json.dumps({"markups": [{"type": "Fiducial", "coordinateSystem": system, "controlPoints": control}]})


def vtk(points: np.ndarray, kind: str, title: str = "made up") -> bytes:
    head = f"# vtk DataFile Version 4.2\n{title}\n{kind}\nDATASET POLYDATA\nPOINTS {len(points)} float\n".encode()
    tail = (
        b"\nPOLYGONS 1 4\n3 0 1 2\n"
        if kind == "ASCII"
        else b"\nPOLYGONS 1 4\n" + np.array([3, 0, 1, 2], ">i4").tobytes()
    )
    if kind == "BINARY":
        return head + points.astype(">f4").tobytes() + tail
    return head + "\n".join(" ".join(map(str, point)) for point in points.tolist()).encode() + tail


def stl(points: np.ndarray, binary: bool) -> bytes:
    corners = points[:3]
    if binary:
        numbers = np.concatenate([np.zeros(3), corners.ravel()]).astype("<f4")
        return b"made up".ljust(80) + (1).to_bytes(4, "little") + numbers.tobytes() + b"\0\0"
    lines = "".join(f"vertex {x} {y} {z}\n" for x, y, z in corners)
    return f"solid made up\nfacet normal 0 0 0\nouter loop\n{lines}endloop\nendfacet\nendsolid\n".encode()
